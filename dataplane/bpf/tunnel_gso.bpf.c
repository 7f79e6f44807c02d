// SPDX-License-Identifier: Apache-2.0
/*
 * Leads what a worker writes to its TAP device to the NIC and nowhere else: no
 * route, neighbour or filter of the host has a say, as with the worker's socket.
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

/* Interface index of the NIC. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} nic SEC(".maps");

SEC("tcx/ingress")
int tunnel_gso(struct __sk_buff *packet)
{
	__u32 only = 0;
	__u32 *index = bpf_map_lookup_elem(&nic, &only);
	if (!index)
		return TC_ACT_SHOT;
	return bpf_redirect(*index, 0);
}

char program_license[] SEC("license") = "Apache-2.0";
