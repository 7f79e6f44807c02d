//! What `forward` decides about one packet. There is no third way: a packet goes on, or it is dropped for one reason.

pub use ripstop_fib::{DropReason, HEADER_MAX};

/// Length of the header that [`FromHost::Send`] pushes: outer Ethernet to inner Ethernet.
pub const HEADER_LEN: usize = 64;

/// The fate of a packet that came from the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromNic {
    /// Take off `strip` bytes, keep `len` of the rest, and hand that to the host.
    Deliver {
        /// Bytes of tunnel headers.
        strip: usize,
        /// Length of the inner IP packet.
        len: usize,
        /// The type-of-service octet to write into the inner header, if the outer header's ECN field changes it.
        tos: Option<u8>,
    },
    /// Forget the packet and count why.
    Drop(DropReason),
}

/// The fate of a packet that came from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromHost {
    /// Put these bytes before the packet and send it.
    Send([u8; HEADER_LEN]),
    /// Forget the packet and count why.
    Drop(DropReason),
}
