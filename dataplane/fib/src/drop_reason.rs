//! The catalogue of reasons for which a worker drops a packet.
//!
//! One list gives the stable number (the index of the counter in the stats region), the name (metrics, JSON, `ripstop
//! drops`) and the sentence that explains it. Append only: a number is never reused.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal;)+) => {
        /// Why a packet was dropped. The documentation of each variant is what `ripstop drops` shows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $variant = $number,)+ }

        impl DropReason {
            /// All reasons in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The name in counters, metrics and JSON.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What happened, whose fault it is, and what to look at.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc,)+).trim_ascii_start(),)+ }
            }
        }
    };
}

drop_reasons! {
    /// The frame ends inside its outer Ethernet, IP, UDP or VXLAN header: damaged on the wire, or not a tunnel packet.
    OuterTruncated = 0, "outer_truncated";
    /// The outer packet is not plain IPv4 or IPv6: options, extension headers or an unexpected VLAN tag; the XDP program passes such packets to the kernel, so this is a race with its reconfiguration.
    OuterHeader = 1, "outer_header";
    /// The outer packet is a fragment; the XDP program passes fragments to the kernel, so this is a race with its reconfiguration.
    OuterFragment = 2, "outer_fragment";
    /// The outer IPv4 header checksum is wrong: damaged on the wire, or a sender with broken checksum offload.
    OuterChecksum = 3, "outer_checksum";
    /// The outer IP or UDP length contradicts the frame: a damaged or forged packet.
    OuterLength = 4, "outer_length";
    /// The outer destination is not this node's address, or the protocol or port is not the tunnel's: a race with a change of this node's address.
    OuterDestination = 5, "outer_destination";
    /// The VXLAN header has flags or reserved bits other than the one that RFC 7348 sets: another tunnel format on our port.
    VxlanFlags = 6, "vxlan_flags";
    /// The VXLAN network identifier is not the cluster's: another overlay on our port, or a peer with another VNI in its net-conf.json.
    VxlanVni = 7, "vxlan_vni";
    /// The outer source is no peer: a node without a lease, a stale lease table, or an attack.
    UnknownPeer = 8, "unknown_peer";
    /// The frame ends inside the inner Ethernet or IP header.
    InnerTruncated = 9, "inner_truncated";
    /// The inner destination MAC is not this node's VTEP MAC: the sender has a stale lease of this node.
    InnerDestinationMac = 10, "inner_destination_mac";
    /// The inner source MAC is this node's own, or a group address: a loop, or two nodes with the same VTEP MAC.
    InnerSourceMac = 11, "inner_source_mac";
    /// The inner frame carries a VLAN tag, which pods of this network never have.
    InnerVlan = 12, "inner_vlan";
    /// The inner frame is not of the tunnel's address family.
    InnerEtherType = 13, "inner_ether_type";
    /// The inner IP version or header length is impossible.
    InnerHeader = 14, "inner_header";
    /// The inner IP length is longer than what the tunnel packet carries, or shorter than its own header.
    InnerLength = 15, "inner_length";
    /// The inner IPv4 header checksum is wrong.
    InnerChecksum = 16, "inner_checksum";
    /// The inner source lies outside the lease of the peer that sent it: spoofing, or traffic that the peer failed to masquerade.
    InnerSource = 17, "inner_source";
    /// The inner destination is not in this node's lease: the sender has a stale lease table, or tries to use this node as a router.
    InnerDestination = 18, "inner_destination";
    /// Congestion was marked on the outer header of a packet whose transport does not understand the mark; RFC 6040 section 4.2 has it dropped.
    EcnNotCapable = 19, "ecn_not_capable";
    /// The packet came in several descriptors: larger than one frame of the UMEM.
    MultiBuffer = 20, "multi_buffer";
    /// The kernel refused the packet at the host door (rip0): the device is down, or memory is short.
    HostWriteFailed = 21, "host_write_failed";
    /// The kernel handed over a packet of an address family that this node has no lease in.
    HostWithoutLease = 22, "host_without_lease";
    /// The kernel handed over a packet whose IP header is impossible or does not agree with its length.
    HostHeader = 23, "host_header";
    /// No lease covers the destination: it went away after the packet was routed to rip0.
    NoRoute = 24, "no_route";
    /// The way to the destination's node is not resolved: its gateway or neighbour went away after the packet was routed to rip0.
    Unresolved = 25, "unresolved";
    /// The destination is this node's own lease: a routing loop on this node.
    LocalDestination = 26, "local_destination";
    /// The packet is larger than the pod MTU.
    TooBig = 27, "too_big";
    /// No forwarding table has been published yet, or none that this version can read.
    NoTable = 28, "no_table";
    /// The forwarding table contradicts itself: an index in it points outside. Please report it.
    TableDamaged = 29, "table_damaged";
    /// The transmit ring of the NIC queue was full when a packet had to be sent.
    NicTransmitFull = 30, "nic_transmit_full";
    /// The outer UDP checksum is wrong, or absent over IPv6 where RFC 8200 section 8.1 demands one: damaged on the wire, or a sender with broken checksum offload.
    OuterUdpChecksum = 31, "outer_udp_checksum";
    /// The inner packet is a fragment that would overwrite the transport header of another (RFC 1858, RFC 3128), that hides it (RFC 7112), or that ends beyond the longest packet: an attack.
    InnerFragment = 32, "inner_fragment";
    /// The inner packet is IPv6 neighbour discovery (RFC 4861), such as a router advertisement: it belongs to one link and never goes through a tunnel.
    NeighbourDiscovery = 33, "neighbour_discovery";
    /// The inner packet is an ICMP redirect: only a router on the same link may send one (RFC 1122 section 3.2.2.2).
    IcmpRedirect = 34, "icmp_redirect";
    /// The source is not in this node's lease: a pod that forges its source, or traffic that should have been masqueraded on its way to another node's pod.
    SourceNotLocal = 35, "source_not_local";
    /// The packet came without a tunnel and its source is in no peer's lease: a stale lease table, or an attack.
    UnknownSource = 36, "unknown_source";
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Index of the reason's counter.
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }
}

const _: () = {
    let mut index = 0;
    while index < DropReason::COUNT {
        assert!(
            DropReason::ALL[index] as usize == index,
            "drop reasons are numbered in order, without gaps"
        );
        index += 1;
    }
};
