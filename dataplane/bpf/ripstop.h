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

/* Which tunnel of a family is ours. */
enum ripstop_tunnel {
	/* None: packets to our address are the kernel's. */
	RIPSTOP_TUNNEL_NONE = 0,
	/* Ethernet in VXLAN in UDP. */
	RIPSTOP_TUNNEL_VXLAN = 1,
	/* An IPv4 packet in UDP. */
	RIPSTOP_TUNNEL_UDP = 2,
	/* An IPv4 packet in IPv4. */
	RIPSTOP_TUNNEL_IPIP = 3,
};

/*
 * What is ours. Addresses, masks, port and tag are the bytes as they stand in
 * a packet (network order); the rest are plain numbers.
 *
 * The data plane never changes one: it makes another and puts that into its
 * place, and takes the old one away only when no program can be reading it.
 */
struct ripstop_match4 {
	/* enum ripstop_tunnel. */
	__u32 tunnel;
	/* Our end of it. */
	__u32 local;
	/* Whether packets between pods are ours without a tunnel, too. */
	__u32 direct;
	/* This node's pods. */
	__u32 subnet;
	__u32 subnet_mask;
	/* All pods. */
	__u32 network;
	__u32 network_mask;
};

/* The same for IPv6. */
struct ripstop_match6 {
	__u32 tunnel;
	__u32 local[4];
	__u32 direct;
	__u32 subnet[4];
	__u32 subnet_mask[4];
	__u32 network[4];
	__u32 network_mask[4];
};

struct ripstop_match {
	struct ripstop_match4 v4;
	struct ripstop_match6 v6;
	/* VXLAN network identifier. */
	__u32 vni;
	/* UDP destination port of the tunnel. */
	__u16 port;
	/* The 802.1Q tag that our frames carry: its VLAN identifier, 0 for no tag. */
	__u16 vlan;
	/* Longest frame for a socket. */
	__u32 frame_bytes_max;
};

_Static_assert(sizeof(struct ripstop_match) == 128, "mirrored in src/xdp.rs");
_Static_assert(__builtin_offsetof(struct ripstop_match, v6) == 28,
	       "mirrored in src/xdp.rs");
_Static_assert(__builtin_offsetof(struct ripstop_match, vni) == 116,
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
	/* Nothing of ours: to the kernel. */
	RIPSTOP_PASSED_OTHER = 8,
	/* Ours, but the worker of the receive queue has stopped moving: to the kernel. */
	RIPSTOP_STALLED = 9,
	/* Another VLAN than ours, or none where ours has a tag: to the kernel. */
	RIPSTOP_OTHER_VLAN = 10,
	/* Tunnel packet over IPv6 without a UDP checksum: to the kernel. */
	RIPSTOP_UDP_CHECKSUM = 11,

	RIPSTOP_OUTCOMES = 12,
};

#endif
