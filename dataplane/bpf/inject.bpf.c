// SPDX-License-Identifier: Apache-2.0
/*
 * Transmits a worker's frames as an XDP program does: the worker runs it once
 * for each frame (BPF_PROG_RUN with live frames, Linux 5.18). Each run is given
 * an empty packet, makes a copy of the next ordered frame of it, and sends that
 * to the one device in the map. So nothing is paid for socket buffers.
 *
 * The frames are the worker's packet memory, an array of one entry per frame,
 * which the verifier can see no packet to leave: a packet begins in the first
 * 512 bytes of its frame and is at least 512 shorter than the frame.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

/* Most frames of one call, and the part of a frame that a packet begins in. */
#define ORDERS 256
#define START 512
/* Length of the packet that each run begins with. */
#define EMPTY 64
/* A live frame lies in a page of 4096 bytes, with headroom, tailroom and its own head. */
#define LENGTH_MAX 3392

struct order {
	__u32 frame;
	__u16 start;
	__u16 length;
};

/*
 * The worker writes all of it between calls. During one, next counts the runs,
 * and what is not sent gets the length 0.
 */
struct orders {
	__u32 next;
	__u32 count;
	struct order order[ORDERS];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct orders);
} orders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_DEVMAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} target SEC(".maps");

struct frame2048 {
	__u8 bytes[2048];
};

struct frame4096 {
	__u8 bytes[4096];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame2048);
} frames2048 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct frame4096);
} frames4096 SEC(".maps");

static __always_inline int transmit(struct xdp_md *ctx, void *frames, __u32 length_max)
{
	__u32 only = 0;
	struct orders *list = bpf_map_lookup_elem(&orders, &only);
	if (!list)
		return XDP_DROP;
	__u32 at = list->next;
	if (at >= ORDERS || at >= list->count)
		return XDP_DROP;
	list->next = at + 1;

	volatile struct order *order = &list->order[at];
	__u32 frame = order->frame;
	__u32 start = order->start & (START - 1);
	__u32 length = order->length;
	if (length > length_max)
		goto refuse;
	/* Keeps clang from making one comparison of two, which the verifier does not understand. */
	barrier_var(length);
	if (length < 14)
		goto refuse;
	__u8 *bytes = bpf_map_lookup_elem(frames, &frame);
	if (!bytes)
		goto refuse;
	if (bpf_xdp_adjust_tail(ctx, (int)length - EMPTY))
		goto refuse;
	if (bpf_xdp_store_bytes(ctx, 0, bytes + start, length))
		goto refuse;
	if (bpf_redirect_map(&target, 0, XDP_DROP) == XDP_REDIRECT)
		return XDP_REDIRECT;
refuse:
	order->length = 0;
	return XDP_DROP;
}

SEC("xdp")
int inject2048(struct xdp_md *ctx)
{
	return transmit(ctx, &frames2048, 2048 - START);
}

SEC("xdp")
int inject4096(struct xdp_md *ctx)
{
	return transmit(ctx, &frames4096, LENGTH_MAX);
}

char program_license[] SEC("license") = "Apache-2.0";
