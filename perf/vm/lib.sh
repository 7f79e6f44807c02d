# What the scripts of the VM lab share; they source it.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything fetched, unpacked and packed is kept here; removing the folder loses nothing but time.
vm=${CARGO_TARGET_DIR:-$repo/target}/vm

say() { printf 'vm: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }
# What the world outside does not give, as opposed to what is wrong here.
unavailable() { say "$*"; exit 3; }

# What a kernel that has crashed says on its console, and the first line of that in a file.
OOPS='BUG: |Oops: |kernel BUG at|general protection fault|Kernel panic'
oops_in() { grep -m1 -E "$OOPS" "$1" | tr -d '\r' | sed 's/^\[[^]]*\] *//'; }

# An empty root file system, in which /bin, /lib and so on lead to /usr as in Debian.
skeleton() {
    mkdir -p "$1"/usr/{bin,sbin,lib,lib64}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$1"
}

# Copies programs into a root file system, each with the shared libraries that it names: to where they are here, or into
# the folder given with --to. Programs lose their debug information, which only costs time to load.
add_programs() {
    local root=$1 to='' program library
    shift
    if [ "$1" = --to ]; then to=$2; shift 2; mkdir -p "$root$to"; fi
    for program; do
        local place=$root${to:-$(dirname "$program")}/$(basename "$program")
        mkdir -p "$(dirname "$place")"
        cp -L --preserve=mode "$program" "$place"
        # A script has nothing to strip and no libraries; neither has a static program the second.
        [ -z "$to" ] || strip --strip-debug "$place" 2>/dev/null || true
        for library in $(ldd "$program" 2>/dev/null | grep -o '/[^ ]*'); do
            [ -e "$root$library" ] && continue
            mkdir -p "$root$(dirname "$library")"
            cp -L --preserve=mode "$library" "$root$library"
        done
    done
}

# Packs a folder as an initramfs archive. Several may follow each other; later files replace earlier ones.
pack() { (cd "$1" && find . | LC_ALL=C sort | cpio --quiet --create --format=newc --owner=0:0); }
