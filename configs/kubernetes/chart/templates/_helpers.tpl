{{/* net-conf.json, made as data, so that quoting is nobody's business. Flannel's defaults are left to the programs. */}}
{{- define "ripstop.netConf" -}}
{{- $v := .Values.flannel -}}
{{- $backend := dict "Type" $v.backend -}}
{{- $keys := dict -}}
{{- if eq $v.backend "vxlan" -}}
{{- $keys = dict "Port" $v.backendPort "VNI" $v.vni "MTU" $v.mtu "GBP" $v.GBP "DirectRouting" $v.directRouting "MacPrefix" $v.macPrefix -}}
{{- else if eq $v.backend "ipip" -}}
{{- $keys = dict "DirectRouting" $v.directRouting -}}
{{- else if eq $v.backend "udp" -}}
{{- $keys = dict "Port" $v.backendPort -}}
{{- else if eq $v.backend "wireguard" -}}
{{- $keys = dict "ListenPort" $v.backendPort "ListenPortV6" $v.backendPortv6 "PSK" ($v.psk | default "" | toString) "MTU" $v.mtu "Mode" ($v.tunnelMode | default "" | toString) "PersistentKeepaliveInterval" $v.keepaliveInterval -}}
{{- end -}}
{{- range $key, $value := $keys -}}
{{- if $value -}}
{{- $_ := set $backend $key $value -}}
{{- end -}}
{{- end -}}
{{- if ne (toString .Values.ripstop.dscp) "" -}}
{{- $_ := set $backend "DSCP" .Values.ripstop.dscp -}}
{{- end -}}
{{- $conf := dict "Backend" $backend -}}
{{- if .Values.podCidr -}}
{{- $_ := set $conf "Network" .Values.podCidr -}}
{{- else -}}
{{- $_ := set $conf "EnableIPv4" false -}}
{{- end -}}
{{- if .Values.podCidrv6 -}}
{{- $_ := set $conf "EnableIPv6" true -}}
{{- $_ := set $conf "IPv6Network" .Values.podCidrv6 -}}
{{- end -}}
{{- if $v.enableNFTables -}}
{{- $_ := set $conf "EnableNFTables" true -}}
{{- end -}}
{{- toPrettyJson $conf -}}
{{- end -}}

{{/* The data plane's flags that say the same as the control plane's: which interface. */}}
{{- define "ripstop.dataplaneArgs" -}}
{{- $args := list -}}
{{- $next := false -}}
{{- range $flag := .Values.flannel.args -}}
{{- if $next -}}
{{- $args = append $args (printf "--iface=%s" .) -}}
{{- $next = false -}}
{{- else if regexMatch "^--?iface$" . -}}
{{- $next = true -}}
{{- else if regexMatch "^--?iface=" . -}}
{{- $args = append $args (printf "-%s" . | replace "---" "--") -}}
{{- else if regexMatch "^--?iface-(regex|can-reach)" . -}}
{{- range $name, $file := $.Values.ripstop.dataplane.config -}}
{{- if eq (toString $file.nic) "auto" -}}
{{- fail (printf "%s chooses an interface for the control plane, and the data plane cannot follow: name the NIC in ripstop.dataplane.config, %s" $flag $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (concat $args .Values.ripstop.dataplane.args) -}}
{{- end -}}

{{/* Labels of everything that belongs to a node. */}}
{{- define "ripstop.labels" -}}
{{- merge (dict "tier" "node" "app" "flannel") .Values.ripstop.selectorLabels | toYaml -}}
{{- end -}}
