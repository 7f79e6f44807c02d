//! What `forward` decides about one packet. There is no third way: a packet goes on, or it is dropped for one reason.

pub use ripstop_fib::{DropReason, HEADER_MAX};

/// The bytes directly before a packet from the host: where its tunnel header is written, at the end.
pub type Front = [u8; HEADER_MAX];

/// The fate of a packet that came from the NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromNic {
    /// Take off `strip` bytes, keep `len` of the rest, and hand that to the host.
    Deliver {
        /// Bytes of outer headers.
        strip: usize,
        /// Length of the inner IP packet.
        len: usize,
        /// The type-of-service octet or traffic class to write into the inner header, if the outer header's ECN field
        /// changes it.
        tos: Option<u8>,
    },
    /// Forget the packet and count why.
    Drop(DropReason),
}

/// The fate of a packet that came from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromHost {
    /// Send the packet with the last `push` bytes of the [`Front`] before it.
    Send {
        /// Length of the outer headers.
        push: usize,
    },
    /// Forget the packet and count why.
    Drop(DropReason),
}
