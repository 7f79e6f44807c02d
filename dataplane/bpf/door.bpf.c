// SPDX-License-Identifier: Apache-2.0
/*
 * The far end of the host door that is a veth pair: whatever the host sends to
 * a queue of rip0 goes to the worker of that queue. Nobody else lives there, so
 * what has no worker is dropped.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#include "ripstop.h"

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, RIPSTOP_QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

SEC("xdp")
int door(struct xdp_md *ctx)
{
	return bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_DROP);
}

char program_license[] SEC("license") = "Apache-2.0";
