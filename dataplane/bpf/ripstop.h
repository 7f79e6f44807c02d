/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the XDP program and the data plane owe each other. `src/xdp.rs` mirrors
 * every definition here and checks sizes when it loads the object; a change on
 * one side is a change on the other.
 */
#ifndef RIPSTOP_H
#define RIPSTOP_H

#include <linux/types.h>

/* One slot per receive queue; the largest NICs have fewer. */
#define RIPSTOP_QUEUES_MAX 1024

/*
 * The one tunnel that is ours, in two words that the data plane stores while
 * the program runs:
 *
 *             63 ........ 48 47 ........ 32 31 .................... 0
 *   endpoint |  generation  |   UDP port   |   local IPv4 address    |
 *             63 ........ 48 47 ................. 24 23 ........... 0
 *   network  |  generation  |         zero          |      VNI       |
 *
 * Address and port are the bytes as they stand in a packet (network order),
 * the VNI is a plain number. 32 + 16 + 24 bits do not fit into one word, and
 * two words cannot be stored at once. So each carries the generation of the
 * configuration that it belongs to, and the program uses a pair only when both
 * carry the same one: a half-written configuration matches nothing, and for
 * these few nanoseconds the kernel gets the packets. No memory order between
 * the two words is needed. Generation 0 means "off".
 */
struct ripstop_tunnel {
	__u64 endpoint;
	__u64 network;
};

_Static_assert(sizeof(struct ripstop_tunnel) == 16, "mirrored in src/xdp.rs");
_Static_assert(__builtin_offsetof(struct ripstop_tunnel, network) == 8,
	       "mirrored in src/xdp.rs");

/*
 * What became of a frame: the index of its counter. Every frame that the
 * program sees has exactly one. The numbers are stable; append, do not reuse.
 */
enum ripstop_outcome {
	/* To a socket. */
	RIPSTOP_REDIRECTED = 0,
	/* Ours in every respect, but the receive queue has no socket. */
	RIPSTOP_NO_SOCKET = 1,
	/* To our address, but not what a worker takes: to the kernel. */
	RIPSTOP_FRAGMENT = 2,
	RIPSTOP_IP_OPTIONS = 3,
	RIPSTOP_BAD_LENGTH = 4,
	RIPSTOP_VXLAN_FLAGS = 5,
	RIPSTOP_OTHER_VNI = 6,
	RIPSTOP_TOO_LONG = 7,
	/* No tunnel traffic of ours: to the kernel. */
	RIPSTOP_PASSED_OTHER = 8,
	/* Ours, but the worker of the receive queue has stopped moving: to the kernel. */
	RIPSTOP_STALLED = 9,

	RIPSTOP_OUTCOMES = 10,
};

#endif
