// SPDX-License-Identifier: Apache-2.0
/*
 * The gate in front of the workers: sends to a socket only what is exactly our
 * tunnel's, or a packet between pods that needs no tunnel, and passes
 * everything else to the kernel, which is what would have happened without us.
 * It drops nothing and changes nothing.
 *
 * It decides by the outer headers and their lengths. It does not ask who the
 * sender is, nor verify the IP header checksum, nor look at what is inside a
 * tunnel packet, as the kernel's tunnel devices do not when they choose a
 * packet: a worker does all that, where a refusal has a reason and a counter.
 * Of a packet without a tunnel it looks at the addresses alone, because there
 * the kernel would route what a worker refuses.
 * A VLAN tag that the NIC has taken off is out of its sight.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "ripstop.h"

/* RFC 791 section 3.1: more-fragments flag and fragment offset. */
#define IP_MORE_FRAGMENTS 0x2000
#define IP_FRAGMENT_OFFSET 0x1fff

/* RFC 8200 section 4: the headers between a fixed IPv6 header and its payload. */
#define IPV6_HOP_BY_HOP 0
#define IPV6_ROUTING 43
#define IPV6_FRAGMENT 44
#define IPV6_DESTINATION 60

/* RFC 7348 section 5: the I flag alone, the other 31 bits reserved. */
#define VXLAN_VNI_PRESENT 0x08000000
#define VXLAN_RESERVED_LOW 0x000000ff

/* IEEE 802.1Q 9.6: the VLAN identifier, below priority and drop eligibility. */
#define VLAN_ID 0x0fff

/*
 * The kernel's struct ethhdr is packed, which makes clang load its protocol
 * byte by byte. Drivers align frames so that what follows it is on four bytes.
 */
struct ethernet_header {
	__u8 destination[6];
	__u8 source[6];
	__be16 protocol;
};

/* IEEE 802.1Q 9.4: the rest of a frame that begins with ETH_P_8021Q. */
struct tagged_ethernet_header {
	struct ethernet_header ethernet;
	__be16 control;
	__be16 protocol;
};

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

/*
 * The configuration: one map in the one place of another. The data plane swaps
 * the whole inner map, and the kernel lets it go on only when no program that
 * saw the old one still runs (kernel/bpf/syscall.c, maybe_wait_bpf_programs).
 * So a frame is judged by one configuration or by the other, never by a mix.
 * An empty place is "off".
 */
struct match_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	/* Sizes, not types: clang 14 leaves out the type that only an inner map names. */
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct ripstop_match));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct match_map);
} configuration SEC(".maps");

/*
 * Has the compiler load again what it loaded before. Without it clang keeps so
 * many words of two addresses at hand that it puts some on the stack, 32 bits
 * at a time and several in one place, and Linux 6.1 takes the second for an
 * attack on the first, from a process without CAP_PERFMON
 * (kernel/bpf/verifier.c, check_stack_write_fixed_off).
 */
#define forget_loads() asm volatile("" ::: "memory")

/* A frame as the functions below pass it on; nothing of it outlives the inlining. */
struct frame {
	struct xdp_md *context;
	void *data;
	void *data_end;
};

/*
 * The last question to a packet that is ours in every other respect. A longer
 * one would be lost in the socket; generic mode meets them on ordinary networks,
 * because there GRO has merged packets before the program runs.
 */
static __always_inline enum ripstop_outcome
if_it_fits(const struct ripstop_match *match, __u64 frame_bytes)
{
	if (frame_bytes > match->frame_bytes_max)
		return RIPSTOP_TOO_LONG;
	return RIPSTOP_REDIRECTED;
}

/*
 * A UDP packet to our address with IP options. Its port lies at an offset that
 * is not a constant; arithmetic on packet pointers with such an offset would
 * require CAP_PERFMON, so a helper fetches it.
 */
static __always_inline enum ripstop_outcome
classify_with_options(struct frame *frame, __u32 udp_offset, __be16 port)
{
	struct udphdr udp;

	if (bpf_xdp_load_bytes(frame->context, udp_offset, &udp, sizeof(udp)) < 0 ||
	    udp.dest != port)
		return RIPSTOP_PASSED_OTHER;
	return RIPSTOP_IP_OPTIONS;
}

/*
 * A VXLAN packet for our port and address: say what is amiss. `rest` is the
 * frame behind its UDP header, `payload_bytes` what the IP header says of its
 * UDP packet, `end_bytes` where in the frame that would end.
 */
static __always_inline enum ripstop_outcome
classify_vxlan(struct frame *frame, const struct ripstop_match *match, struct udphdr *udp,
	       __u32 payload_bytes, __u32 end_bytes)
{
	struct vxlan_header *vxlan = (void *)(udp + 1);
	/*
	 * The helper and not data_end - data: it counts the further buffers of
	 * a jumbo frame, and subtracting pointers requires CAP_PERFMON, too.
	 */
	__u64 frame_bytes = bpf_xdp_get_buff_len(frame->context);
	__u32 udp_bytes = bpf_ntohs(udp->len);

	if (udp_bytes < sizeof(*udp) + sizeof(*vxlan) || payload_bytes != udp_bytes ||
	    end_bytes > frame_bytes || (void *)(vxlan + 1) > frame->data_end)
		return RIPSTOP_BAD_LENGTH;

	__u32 vni_word = bpf_ntohl(vxlan->vni);

	/*
	 * The kernel's VXLAN device takes the group policy (G) if it is told to,
	 * and refuses the rest. Either way it is the one to do it.
	 */
	if (vxlan->flags != bpf_htonl(VXLAN_VNI_PRESENT) || (vni_word & VXLAN_RESERVED_LOW))
		return RIPSTOP_VXLAN_FLAGS;
	if (vni_word >> 8 != match->vni)
		return RIPSTOP_OTHER_VNI;
	return if_it_fits(match, frame_bytes);
}

/* The same for a packet of the UDP tunnel over IPv4. */
static __always_inline enum ripstop_outcome
classify_udp(struct frame *frame, const struct ripstop_match *match, struct udphdr *udp,
	     __u32 payload_bytes, __u32 end_bytes)
{
	__u64 frame_bytes = bpf_xdp_get_buff_len(frame->context);
	__u32 udp_bytes = bpf_ntohs(udp->len);

	if (udp_bytes < sizeof(*udp) || payload_bytes != udp_bytes || end_bytes > frame_bytes)
		return RIPSTOP_BAD_LENGTH;
	return if_it_fits(match, frame_bytes);
}

/* An IPv4 packet to our address, `offset` bytes into the frame, where the tunnel is in UDP. */
static __always_inline enum ripstop_outcome
classify_udp_tunnel4(struct frame *frame, const struct ripstop_match *match, struct iphdr *ip,
		     __u32 offset)
{
	if (ip->protocol != IPPROTO_UDP)
		return RIPSTOP_PASSED_OTHER;
	/*
	 * Ahead of the port: only the first fragment has one. So this counts
	 * every UDP fragment to our address, whatever port it is for.
	 */
	if (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
		return RIPSTOP_FRAGMENT;
	if (ip->ihl > 5)
		return classify_with_options(frame, offset + ip->ihl * 4, match->port);

	struct udphdr *udp = (void *)(ip + 1);

	if ((void *)(udp + 1) > frame->data_end || udp->dest != match->port)
		return RIPSTOP_PASSED_OTHER;

	__u32 ip_bytes = bpf_ntohs(ip->tot_len);

	if (match->v4.tunnel == RIPSTOP_TUNNEL_VXLAN)
		return classify_vxlan(frame, match, udp, ip_bytes - sizeof(*ip), offset + ip_bytes);
	return classify_udp(frame, match, udp, ip_bytes - sizeof(*ip), offset + ip_bytes);
}

/* The same where the tunnel is in IP. */
static __always_inline enum ripstop_outcome
classify_ipip(struct frame *frame, const struct ripstop_match *match, struct iphdr *ip,
	      __u32 offset)
{
	if (ip->protocol != IPPROTO_IPIP)
		return RIPSTOP_PASSED_OTHER;
	if (ip->frag_off & bpf_htons(IP_MORE_FRAGMENTS | IP_FRAGMENT_OFFSET))
		return RIPSTOP_FRAGMENT;
	if (ip->ihl > 5)
		return RIPSTOP_IP_OPTIONS;

	__u64 frame_bytes = bpf_xdp_get_buff_len(frame->context);
	__u32 ip_bytes = bpf_ntohs(ip->tot_len);

	if (ip_bytes < sizeof(*ip) || offset + ip_bytes > frame_bytes)
		return RIPSTOP_BAD_LENGTH;
	return if_it_fits(match, frame_bytes);
}

static __always_inline enum ripstop_outcome
classify_tunnel4(struct frame *frame, const struct ripstop_match *match, struct iphdr *ip,
		 __u32 offset)
{
	switch (match->v4.tunnel) {
	case RIPSTOP_TUNNEL_VXLAN:
	case RIPSTOP_TUNNEL_UDP:
		return classify_udp_tunnel4(frame, match, ip, offset);
	case RIPSTOP_TUNNEL_IPIP:
		return classify_ipip(frame, match, ip, offset);
	default:
		return RIPSTOP_PASSED_OTHER;
	}
}

/*
 * An IPv4 packet that is not to our address: perhaps one between pods. Then it
 * is ours whatever it looks like: left to the kernel, a fragment that overwrites
 * another's ports would be routed to the pod.
 */
static __always_inline enum ripstop_outcome
classify_direct4(struct frame *frame, const struct ripstop_match *match, struct iphdr *ip)
{
	if (!match->v4.direct || (ip->daddr & match->v4.subnet_mask) != match->v4.subnet ||
	    (ip->saddr & match->v4.network_mask) != match->v4.network ||
	    (ip->saddr & match->v4.subnet_mask) == match->v4.subnet)
		return RIPSTOP_PASSED_OTHER;
	return if_it_fits(match, bpf_xdp_get_buff_len(frame->context));
}

static __always_inline enum ripstop_outcome
classify_ipv4(struct frame *frame, const struct ripstop_match *match, __u32 offset)
{
	struct iphdr *ip = frame->data + offset;

	if ((void *)(ip + 1) > frame->data_end || ip->version != 4 || ip->ihl < 5)
		return RIPSTOP_PASSED_OTHER;
	if (ip->daddr == match->v4.local)
		return classify_tunnel4(frame, match, ip, offset);
	return classify_direct4(frame, match, ip);
}

static __always_inline int same_address(const struct in6_addr *address, const __u32 *other)
{
	return address->in6_u.u6_addr32[0] == other[0] && address->in6_u.u6_addr32[1] == other[1] &&
	       address->in6_u.u6_addr32[2] == other[2] && address->in6_u.u6_addr32[3] == other[3];
}

static __always_inline int within(const struct in6_addr *address, const __u32 *prefix,
				  const __u32 *mask)
{
	return (address->in6_u.u6_addr32[0] & mask[0]) == prefix[0] &&
	       (address->in6_u.u6_addr32[1] & mask[1]) == prefix[1] &&
	       (address->in6_u.u6_addr32[2] & mask[2]) == prefix[2] &&
	       (address->in6_u.u6_addr32[3] & mask[3]) == prefix[3];
}

static __always_inline int has_extension_headers(const struct ipv6hdr *ip)
{
	return ip->nexthdr == IPV6_HOP_BY_HOP || ip->nexthdr == IPV6_ROUTING ||
	       ip->nexthdr == IPV6_DESTINATION;
}

/* An IPv6 packet to our address. */
static __always_inline enum ripstop_outcome
classify_tunnel6(struct frame *frame, const struct ripstop_match *match, struct ipv6hdr *ip,
		 __u32 offset)
{
	if (match->v6.tunnel == RIPSTOP_TUNNEL_NONE)
		return RIPSTOP_PASSED_OTHER;
	if (ip->nexthdr == IPV6_FRAGMENT)
		return RIPSTOP_FRAGMENT;
	/* Whatever they lead to: going through them takes more than a gate should. */
	if (has_extension_headers(ip))
		return RIPSTOP_IP_OPTIONS;

	struct udphdr *udp = (void *)(ip + 1);

	if (ip->nexthdr != IPPROTO_UDP || (void *)(udp + 1) > frame->data_end ||
	    udp->dest != match->port)
		return RIPSTOP_PASSED_OTHER;
	/* RFC 8200 section 8.1; the kernel's device refuses it unless told otherwise. */
	if (udp->check == 0)
		return RIPSTOP_UDP_CHECKSUM;

	__u32 payload_bytes = bpf_ntohs(ip->payload_len);

	return classify_vxlan(frame, match, udp, payload_bytes,
			      offset + sizeof(*ip) + payload_bytes);
}

/* As classify_direct4. */
static __always_inline enum ripstop_outcome
classify_direct6(struct frame *frame, const struct ripstop_match *match, struct ipv6hdr *ip)
{
	if (!match->v6.direct || !within(&ip->daddr, match->v6.subnet, match->v6.subnet_mask))
		return RIPSTOP_PASSED_OTHER;
	forget_loads();
	if (!within(&ip->saddr, match->v6.network, match->v6.network_mask))
		return RIPSTOP_PASSED_OTHER;
	forget_loads();
	if (within(&ip->saddr, match->v6.subnet, match->v6.subnet_mask))
		return RIPSTOP_PASSED_OTHER;
	return if_it_fits(match, bpf_xdp_get_buff_len(frame->context));
}

static __always_inline enum ripstop_outcome
classify_ipv6(struct frame *frame, const struct ripstop_match *match, __u32 offset)
{
	struct ipv6hdr *ip = frame->data + offset;

	if ((void *)(ip + 1) > frame->data_end || ip->version != 6)
		return RIPSTOP_PASSED_OTHER;
	if (same_address(&ip->daddr, match->v6.local))
		return classify_tunnel6(frame, match, ip, offset);
	return classify_direct6(frame, match, ip);
}

/*
 * What follows the Ethernet header and perhaps a tag. `offset` is a constant
 * wherever this is called, which is why the tagged case is compiled separately.
 */
static __always_inline enum ripstop_outcome
classify_packet(struct frame *frame, const struct ripstop_match *match, __be16 protocol,
		__u32 offset)
{
	if (protocol == bpf_htons(ETH_P_IP))
		return classify_ipv4(frame, match, offset);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return classify_ipv6(frame, match, offset);
	/* A tag where none should be, or another one behind ours. */
	if (protocol == bpf_htons(ETH_P_8021Q) || protocol == bpf_htons(ETH_P_8021AD))
		return RIPSTOP_OTHER_VLAN;
	return RIPSTOP_PASSED_OTHER;
}

/* RIPSTOP_REDIRECTED here means "ours"; whether a socket exists is next. */
static __always_inline enum ripstop_outcome classify(struct xdp_md *ctx)
{
	struct frame frame = {
		.context = ctx,
		.data = (void *)(long)ctx->data,
		.data_end = (void *)(long)ctx->data_end,
	};
	struct ethernet_header *ethernet = frame.data;
	__u32 only = 0;

	/* A worker's packets are for one node: multicast and broadcast are the kernel's. */
	if ((void *)(ethernet + 1) > frame.data_end || (ethernet->destination[0] & 1))
		return RIPSTOP_PASSED_OTHER;

	void *inner = bpf_map_lookup_elem(&configuration, &only);

	if (!inner)
		return RIPSTOP_PASSED_OTHER;

	const struct ripstop_match *match = bpf_map_lookup_elem(inner, &only);

	/* Always there; the verifier wants to see it asked. */
	if (!match)
		return RIPSTOP_PASSED_OTHER;
	if (!match->vlan)
		return classify_packet(&frame, match, ethernet->protocol, sizeof(*ethernet));

	struct tagged_ethernet_header *tagged = frame.data;

	if ((void *)(tagged + 1) > frame.data_end ||
	    tagged->ethernet.protocol != bpf_htons(ETH_P_8021Q) ||
	    (tagged->control & bpf_htons(VLAN_ID)) != match->vlan)
		return RIPSTOP_OTHER_VLAN;
	return classify_packet(&frame, match, tagged->protocol, sizeof(*tagged));
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
