// SPDX-License-Identifier: Apache-2.0
/*
 * The gate in front of the workers: sends to a socket only what is exactly our
 * tunnel's, and passes everything else to the kernel, which is what would have
 * happened without us. It drops nothing and changes nothing.
 *
 * It decides by the outer headers and their lengths. It does not ask who the
 * sender is, nor verify the IP header checksum: a worker does both, where a
 * refusal has a reason and a counter. A VLAN tag that the NIC has taken off
 * is out of its sight.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "ripstop.h"

/* RFC 791 section 3.1: more-fragments flag and fragment offset. */
#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

/* RFC 7348 section 5: the I flag alone, the other 31 bits reserved. */
#define VXLAN_VNI_PRESENT 0x08000000
#define VXLAN_RESERVED_LOW 0x000000ff

struct vxlan_header {
	__be32 flags;
	__be32 vni;
};

/* Sockets by receive queue. An absent entry means: the kernel's queue. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, RIPSTOP_QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

/*
 * Until when the worker of a receive queue counts as moving, in nanoseconds of
 * CLOCK_MONOTONIC; 0 is for ever. The data plane keeps pushing it on. A process
 * that is stopped or stuck does not, and the kernel gets its packets instead of
 * a ring that nobody reads.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, RIPSTOP_QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u64);
} deadlines SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, RIPSTOP_OUTCOMES);
	__type(key, __u32);
	__type(value, __u64);
} outcomes SEC(".maps");

/* Stored by the data plane at any time, through a mapping of this section. */
volatile struct ripstop_tunnel tunnel SEC(".data.tunnel") = {};

/*
 * The longest frame that a socket can hold, set before loading. A longer one
 * would be lost in the socket; generic mode meets them on ordinary networks,
 * because there GRO has merged tunnel packets before the program runs.
 */
const volatile __u32 frame_bytes_max SEC(".rodata.limits") = 0;

/*
 * A UDP packet to our address with IP options. Its port lies at an offset that
 * is not a constant; arithmetic on packet pointers with such an offset would
 * require CAP_PERFMON, so a helper fetches it.
 */
static __always_inline enum ripstop_outcome
classify_with_options(struct xdp_md *ctx, __u32 udp_offset, __be16 port)
{
	struct udphdr udp;

	if (bpf_xdp_load_bytes(ctx, udp_offset, &udp, sizeof(udp)) < 0 ||
	    udp.dest != port)
		return RIPSTOP_PASSED_OTHER;
	return RIPSTOP_IP_OPTIONS;
}

/* RIPSTOP_REDIRECTED here means "ours"; whether a socket exists is next. */
static __always_inline enum ripstop_outcome classify(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *data_end = (void *)(long)ctx->data_end;
	struct ethhdr *ethernet = data;
	struct iphdr *ip = (void *)(ethernet + 1);

	if ((void *)(ip + 1) > data_end)
		return RIPSTOP_PASSED_OTHER;
	if (ethernet->h_proto != bpf_htons(ETH_P_IP))
		return RIPSTOP_PASSED_OTHER;
	if (ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_UDP)
		return RIPSTOP_PASSED_OTHER;

	__u64 endpoint = tunnel.endpoint;
	__u64 network = tunnel.network;
	__u16 generation = endpoint >> 48;

	if (generation == 0 || generation != network >> 48)
		return RIPSTOP_PASSED_OTHER;
	if (ip->daddr != (__u32)endpoint)
		return RIPSTOP_PASSED_OTHER;

	/*
	 * Ahead of the port: only the first fragment has one. So this counts
	 * every UDP fragment to our address, whatever port it is for.
	 */
	if (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
		return RIPSTOP_FRAGMENT;

	__be16 port = endpoint >> 32;

	if (ip->ihl > 5)
		return classify_with_options(ctx, sizeof(*ethernet) + ip->ihl * 4, port);

	struct udphdr *udp = (void *)(ip + 1);

	if ((void *)(udp + 1) > data_end || udp->dest != port)
		return RIPSTOP_PASSED_OTHER;

	/*
	 * From here on it is addressed to our tunnel: say what is amiss.
	 * The helper and not data_end - data: it counts the further buffers of
	 * a jumbo frame, and subtracting pointers requires CAP_PERFMON, too.
	 */
	struct vxlan_header *vxlan = (void *)(udp + 1);
	__u64 frame_bytes = bpf_xdp_get_buff_len(ctx);
	__u32 ip_bytes = bpf_ntohs(ip->tot_len);
	__u32 udp_bytes = bpf_ntohs(udp->len);

	if (udp_bytes < sizeof(*udp) + sizeof(*vxlan) ||
	    ip_bytes != sizeof(*ip) + udp_bytes ||
	    sizeof(*ethernet) + ip_bytes > frame_bytes ||
	    (void *)(vxlan + 1) > data_end)
		return RIPSTOP_BAD_LENGTH;

	__u32 vni_word = bpf_ntohl(vxlan->vni);

	/* The kernel's VXLAN device refuses these too, and is the one to count them. */
	if (vxlan->flags != bpf_htonl(VXLAN_VNI_PRESENT) ||
	    (vni_word & VXLAN_RESERVED_LOW))
		return RIPSTOP_VXLAN_FLAGS;
	if (vni_word >> 8 != (network & 0xffffff))
		return RIPSTOP_OTHER_VNI;
	if (frame_bytes > frame_bytes_max)
		return RIPSTOP_TOO_LONG;
	return RIPSTOP_REDIRECTED;
}

/* Whether the worker of the frame's receive queue was moving a moment ago. */
static __always_inline int stalled(struct xdp_md *ctx)
{
	__u32 queue = ctx->rx_queue_index;
	__u64 *deadline = bpf_map_lookup_elem(&deadlines, &queue);

	return deadline && *deadline && *deadline < bpf_ktime_get_ns();
}

/* The one door: the only place that counts, once per frame. */
static __always_inline int gate(struct xdp_md *ctx)
{
	enum ripstop_outcome outcome = classify(ctx);
	int action = XDP_PASS;

	if (outcome == RIPSTOP_REDIRECTED && stalled(ctx))
		outcome = RIPSTOP_STALLED;
	if (outcome == RIPSTOP_REDIRECTED) {
		/* XDP_PASS as flags: what to return for a queue without a socket. */
		action = bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
		if (action != XDP_REDIRECT)
			outcome = RIPSTOP_NO_SOCKET;
	}

	__u32 index = outcome;
	__u64 *count = bpf_map_lookup_elem(&outcomes, &index);

	/* Always there; the verifier wants to see it asked. */
	if (count)
		*count += 1;
	return action;
}

/* For NICs whose frames fit one buffer. */
SEC("xdp")
int ripstop(struct xdp_md *ctx)
{
	return gate(ctx);
}

/* For jumbo NICs: a frame may lie in several buffers, its headers in the first. */
SEC("xdp.frags")
int ripstop_frags(struct xdp_md *ctx)
{
	return gate(ctx);
}

/*
 * Every helper used here is open to any licence, so the true one is stated.
 * A kfunc or a GPL-only helper would be refused by the verifier.
 */
char program_license[] SEC("license") = "Apache-2.0";
