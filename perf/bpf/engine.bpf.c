// SPDX-License-Identifier: Apache-2.0
/*
 * The kernel's part of the harness's engines: programs that take test packets
 * away from an interface (count_*, check_*), and one that writes them on frames
 * of the kernel's own (generate). Of an object only what an engine needs is
 * loaded. A frame that is no test packet is passed, always.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "engine.h"

/* An IPv4 header without options. */
#define IP_PLAIN 0x45
/* RFC 791 section 3.1: more-fragments flag and fragment offset. */
#define IP_FRAGMENT 0x3fff
/* RFC 7348 section 5: the I flag. */
#define VXLAN_FLAGS 0x08000000
/* The loopback device's index in every namespace: what the kernel says live frames came in on. */
#define LOOPBACK 1
/* Segments of the longest super-packet. */
#define SEGMENTS_MAX 64

const volatile struct engine_config config = {};

/* One slot to a CPU; the loader sets the number. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct engine_slot);
} slots SEC(".maps");

/* Sockets by receive queue. */
struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, ENGINE_QUEUES_MAX);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

/* Notes with payloads, where there is no socket; the loader sets the size. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

struct record {
	struct engine_note note;
	__u8 payload[ENGINE_TABLE_BYTES];
};

/* Where a record is put together, one to a CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct record);
} scratch SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 3);
	__type(key, __u32);
	__type(value, struct engine_form);
} forms SEC(".maps");

/* The loader sets the number. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct engine_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__u8 (*value)[ENGINE_TABLE_BYTES];
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct engine_state);
} state SEC(".maps");

/* A test packet that was found. */
struct found {
	/* Offset of the UDP payload from the frame's first byte. */
	__u32 payload;
	/* Bytes of the inner IP and UDP headers. */
	__u32 headers;
	/* Length of the payload. */
	__u32 bytes;
};

static __always_inline __u16 ethertype(void *frame)
{
	return ((struct ethhdr *)frame)->h_proto;
}

/* Whether a frame is a test packet, and where. */
static __always_inline int find(void *frame, void *end, struct found *found)
{
	__u16 inner_type = config.v6 ? bpf_htons(ETH_P_IPV6) : bpf_htons(ETH_P_IP);
	__u32 headers = config.v6 ? 48 : 28;

	if (frame + config.inner + headers + ENGINE_HEAD > end)
		return 0;
	if (config.link) {
		__u16 type = config.tunnel ? bpf_htons(ETH_P_IP) : inner_type;

		if (ethertype(frame) != type)
			return 0;
	}
	if (config.tunnel) {
		struct iphdr *ip = frame + config.link;
		struct udphdr *udp = (void *)(ip + 1);

		if (*(__u8 *)ip != IP_PLAIN || ip->frag_off & bpf_htons(IP_FRAGMENT))
			return 0;
		if (config.tunnel == ENGINE_IPIP) {
			if (ip->protocol != IPPROTO_IPIP)
				return 0;
		} else if (ip->protocol != IPPROTO_UDP || udp->dest != config.port) {
			return 0;
		}
		if (config.tunnel == ENGINE_VXLAN) {
			__u32 *vxlan = (void *)(udp + 1);

			if (vxlan[0] != bpf_htonl(VXLAN_FLAGS) || vxlan[1] != config.vni)
				return 0;
			if (ethertype(vxlan + 2) != inner_type)
				return 0;
		}
	}
	if (config.v6) {
		if (((struct ipv6hdr *)(frame + config.inner))->nexthdr != IPPROTO_UDP)
			return 0;
	} else {
		struct iphdr *ip = frame + config.inner;

		if (*(__u8 *)ip != IP_PLAIN || ip->frag_off & bpf_htons(IP_FRAGMENT))
			return 0;
		if (ip->protocol != IPPROTO_UDP)
			return 0;
	}
	void *payload = frame + config.inner + headers;
	struct udphdr *udp = payload - sizeof(*udp);
	__u32 magic = bpf_ntohl(*(__u32 *)payload);
	__u32 bytes = bpf_ntohs(udp->len);

	if (udp->dest != bpf_htons(ENGINE_TEST_PORT) || bytes < sizeof(*udp) + ENGINE_HEAD)
		return 0;
	if (magic >> 16 != ENGINE_MAGIC && magic != ENGINE_PKTGEN_MAGIC)
		return 0;
	found->payload = config.inner + headers;
	found->headers = headers;
	found->bytes = bytes - sizeof(*udp);
	return 1;
}

static __always_inline struct engine_slot *own_slot(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&slots, &cpu);
}

static __always_inline void count(__u64 packets, __u64 bytes)
{
	struct engine_slot *slot = own_slot();

	if (!slot)
		return;
	slot->packets += packets;
	slot->bytes += bytes;
	slot->last = bpf_ktime_get_coarse_ns();
}

SEC("xdp")
int count_xdp(struct xdp_md *context)
{
	struct found found;

	if (!find((void *)(long)context->data, (void *)(long)context->data_end, &found))
		return XDP_PASS;
	count(1, found.headers + found.bytes);
	return XDP_DROP;
}

SEC("xdp")
int check_xdp(struct xdp_md *context)
{
	void *frame = (void *)(long)context->data;
	struct engine_note *note = frame;
	struct found found;

	if (!find(frame, (void *)(long)context->data_end, &found))
		return XDP_PASS;
	note->at = bpf_ktime_get_ns();
	note->payload = found.payload;
	note->bytes = found.bytes;
	return bpf_redirect_map(&sockets, context->rx_queue_index, XDP_DROP);
}

/* As find, for a packet whose first bytes may lie elsewhere. */
static __always_inline int find_in(struct __sk_buff *packet, struct found *found)
{
	__u32 wanted = config.inner + (config.v6 ? 48 : 28) + ENGINE_HEAD;

	if ((void *)(long)packet->data + wanted > (void *)(long)packet->data_end &&
	    bpf_skb_pull_data(packet, wanted))
		return 0;
	return find((void *)(long)packet->data, (void *)(long)packet->data_end, found);
}

SEC("tc")
int count_tc(struct __sk_buff *packet)
{
	struct found found;
	__u64 segments = packet->gso_segs;

	if (!find_in(packet, &found))
		return TC_ACT_UNSPEC;
	if (!segments)
		segments = 1;
	count(segments, found.bytes + segments * found.headers);
	return TC_ACT_SHOT;
}

/* What is left of a packet's payload. */
struct rest {
	struct __sk_buff *packet;
	struct record *record;
	struct engine_slot *slot;
	__u32 at;
	__u32 bytes;
	__u32 segment_bytes;
};

/* Hands the next segment over; 1 ends the loop. */
static long hand_over(__u32 number, struct rest *rest)
{
	__u32 bytes = rest->bytes < rest->segment_bytes ? rest->bytes : rest->segment_bytes;

	if (!bytes)
		return 1;
	if (bytes > ENGINE_TABLE_BYTES)
		bytes = ENGINE_TABLE_BYTES;
	if (bpf_skb_load_bytes(rest->packet, rest->at, rest->record->payload, bytes))
		return 1;
	rest->record->note.bytes = bytes;
	/* The reader looks by itself; waking it for each packet would cost more than the packet. */
	if (bpf_ringbuf_output(&ring, rest->record, sizeof(rest->record->note) + bytes,
			       BPF_RB_NO_WAKEUP))
		rest->slot->ring_full++;
	rest->at += bytes;
	rest->bytes -= bytes;
	return 0;
}

SEC("tc")
int check_tc(struct __sk_buff *packet)
{
	__u32 zero = 0;
	struct rest rest = {
		.packet = packet,
		.record = bpf_map_lookup_elem(&scratch, &zero),
		.slot = own_slot(),
	};
	struct found found;

	if (!rest.record || !rest.slot || !find_in(packet, &found))
		return TC_ACT_UNSPEC;
	rest.record->note.at = bpf_ktime_get_ns();
	rest.record->note.payload = sizeof(rest.record->note);
	rest.at = found.payload;
	rest.bytes = found.bytes;
	/* A super-packet is as many payloads as the kernel has merged, the last perhaps shorter. */
	rest.segment_bytes = packet->gso_size ? packet->gso_size : found.bytes;
	bpf_loop(SEGMENTS_MAX, hand_over, &rest, 0);
	return TC_ACT_SHOT;
}

static __always_inline __u32 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

SEC("xdp")
int generate(struct xdp_md *context)
{
	__u32 zero = 0, key, number, sequence, time, sum, stretch, bytes;
	struct engine_state *at = bpf_map_lookup_elem(&state, &zero);
	__u8 *pattern = bpf_map_lookup_elem(&table, &zero);
	struct engine_form *form;
	struct engine_flow *flow;
	__u8 *head;

	/* It is attached to an interface so that the kernel keeps it at hand, and has nothing to do there. */
	if (context->ingress_ifindex != LOOPBACK || !at || !pattern)
		return XDP_PASS;
	number = at->flow;
	flow = bpf_map_lookup_elem(&flows, &number);
	key = at->place;
	if (key >= ENGINE_ORDER_MAX || !flow)
		return XDP_ABORTED;
	key = config.order[key];
	form = bpf_map_lookup_elem(&forms, &key);
	if (!form)
		return XDP_ABORTED;
	at->flow = number + 1 < config.flows ? number + 1 : 0;
	at->place = at->place + 1 < config.order_entries ? at->place + 1 : 0;

	if (config.outer_port)
		*(__u16 *)(form->headers + config.outer_port) = flow->outer_port;
	__builtin_memcpy(form->headers + config.to, flow->to, 4);
	if (config.v6)
		__builtin_memcpy(form->headers + config.to + 4, flow->to + 4, 12);
	*(__u16 *)(form->headers + config.source_port) = flow->port;
	sum = ~fold(form->sum + flow->sum) & 0xffff;
	if (config.v6 && !sum)
		sum = 0xffff;
	*(__u16 *)(form->headers + config.checksum) = bpf_htons(sum);

	sequence = flow->sequence++;
	stretch = (number + sequence) % ENGINE_STRETCHES;
	time = bpf_ktime_get_ns() >> 3;
	sum = ENGINE_MAGIC + form->pattern_sums[stretch];
	sum += (number >> 16) + (number & 0xffff);
	sum += (sequence >> 16) + (sequence & 0xffff);
	sum += (time >> 16) + (time & 0xffff);
	sum = ~fold(sum) & 0xffff;
	head = form->headers + config.payload;
	*(__u16 *)head = bpf_htons(ENGINE_MAGIC);
	*(__u16 *)(head + 2) = bpf_htons(sum);
	*(__u32 *)(head + 4) = bpf_htonl(number);
	*(__u32 *)(head + 8) = bpf_htonl(sequence);
	*(__u32 *)(head + 12) = bpf_htonl(time);

	bytes = form->payload;
	if (bytes < ENGINE_HEAD || bytes > ENGINE_PATTERN_MAX)
		return XDP_ABORTED;
	/* A page comes back as whoever had it left it: every byte is written. */
	if (bpf_xdp_adjust_tail(context, (int)(config.payload + bytes) - (int)config.blank))
		return XDP_ABORTED;
	if (bpf_xdp_store_bytes(context, 0, form->headers, config.payload + ENGINE_HEAD))
		return XDP_ABORTED;
	bytes -= ENGINE_HEAD;
	if (bytes && bpf_xdp_store_bytes(context, config.payload + ENGINE_HEAD,
					 pattern + stretch * 8, bytes))
		return XDP_ABORTED;
	at->written++;
	return bpf_redirect(config.interface, 0);
}

char program_license[] SEC("license") = "Apache-2.0";
