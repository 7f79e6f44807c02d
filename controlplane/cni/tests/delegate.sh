#!/bin/sh
# Plays a delegate: keeps what it is told, answers as the files beside it say. Its name is that of the link it is
# called by. Tests only ever link to this file, because a program that somebody is writing cannot be run.
dir=${CNI_PATH%%:*}
conf=$(cat)
if [ "$CNI_COMMAND" = VERSION ]; then
    versions='"1.0.0","1.1.0"'
    [ -e "$dir/old" ] && versions='"0.4.0","1.0.0"'
    printf '{"cniVersion":"1.0.0","supportedVersions":[%s]}' "$versions"
    exit 0
fi
printf '%s %s %s %s [%s] %s\n' "${0##*/}" "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_NETNS" "$conf" >>"$dir/calls"
if [ -e "$dir/fails" ]; then
    cat "$dir/fails"
    exit 7
fi
[ "$CNI_COMMAND" = ADD ] && printf '{"cniVersion": "1.1.0",\n  "whatever":1}\n'
exit 0
