/* SPDX-License-Identifier: Apache-2.0 */
/* What engine.bpf.c and src/engine/bpf.rs share. Multi-byte fields are the machine's own unless they say otherwise. */
#pragma once

#define ENGINE_ORDER_MAX 12
#define ENGINE_HEADERS_MAX 192
#define ENGINE_STRETCHES 64
#define ENGINE_TABLE_BYTES 4096
#define ENGINE_PATTERN_MAX 3200
/* Payload of a test packet before its pattern. */
#define ENGINE_HEAD 16
#define ENGINE_QUEUES_MAX 64

/* See src/engine/packet.rs. */
#define ENGINE_MAGIC 0x5253
#define ENGINE_PKTGEN_MAGIC 0xbe9be955
#define ENGINE_TEST_PORT 9

enum engine_tunnel {
	ENGINE_PLAIN,
	ENGINE_VXLAN,
	ENGINE_UDP,
	ENGINE_IPIP,
};

/* Known before the program is loaded, so that the verifier sees constants. */
struct engine_config {
	/* Both directions. */
	__u32 tunnel;
	/* Bytes of the Ethernet header: 14, or 0 where there is none. */
	__u32 link;
	/* Offset of the inner IP header. */
	__u32 inner;
	/* Whether that is IPv6. */
	__u32 v6;
	/* The tunnel's UDP port in network order. */
	__u32 port;
	/* The second word of the VXLAN header in network order. */
	__u32 vni;

	/* What the generator needs besides. */
	__u32 interface;
	__u32 flows;
	__u32 order_entries;
	/* Offsets; 0 for no outer port that changes. */
	__u32 outer_port;
	__u32 to;
	__u32 source_port;
	__u32 checksum;
	__u32 payload;
	/* Bytes of a frame before it is written. */
	__u32 blank;
	__u8 order[ENGINE_ORDER_MAX];
};

/* Of one CPU; written by it alone. */
struct engine_slot {
	__u64 packets;
	/* Inner. */
	__u64 bytes;
	/* When the last came, to a few milliseconds: CLOCK_MONOTONIC in nanoseconds. */
	__u64 last;
	/* Packets that the ring to user space had no room for. */
	__u64 ring_full;
	__u64 unused[4];
};

/* Written over the first bytes of a frame for a socket, or before the payload in the ring. */
struct engine_note {
	/* When it came: CLOCK_MONOTONIC in nanoseconds. */
	__u64 at;
	/* Offset of the UDP payload from the note's first byte. */
	__u16 payload;
	/* Length of the payload. */
	__u16 bytes;
};

/* One inner packet size of a generator. */
struct engine_form {
	/* Up to and with the first ENGINE_HEAD bytes of the payload; the generator changes it in place. */
	__u8 headers[ENGINE_HEADERS_MAX];
	__u32 sum;
	__u32 payload;
	__u16 pattern_sums[ENGINE_STRETCHES];
};

/* One flow of a generator; addresses and ports in network order. */
struct engine_flow {
	__u8 to[16];
	__u16 port;
	__u16 outer_port;
	__u32 sum;
	__u32 sequence;
	__u32 unused;
};

/* Where a generator is. */
struct engine_state {
	__u32 flow;
	__u32 place;
	/* Frames written. */
	__u64 written;
};
