//! Explicit congestion notification through a tunnel: RFC 6040, both ways.
//!
//! On encapsulation the field is copied (section 4.1, normal mode), marks included: the leaves do that by copying the
//! bits. On decapsulation the two fields are merged.

use crate::verdict::DropReason;
use crate::wire::ECN_MASK;

/// Congestion experienced (RFC 3168 section 5).
const CE: u8 = 0b11;
/// ECN-capable transport, codepoint 1.
const ECT1: u8 = 0b01;
/// ECN-capable transport, codepoint 0.
const ECT0: u8 = 0b10;

/// The octet to write into the inner header, if the outer one changes it: RFC 6040 section 4.2, figure 4.
///
/// # Errors
/// When congestion was marked on a packet whose transport does not understand that.
#[inline]
pub(crate) fn after_decapsulation(inner: u8, outer: u8) -> Result<Option<u8>, DropReason> {
    match (inner & ECN_MASK, outer & ECN_MASK) {
        (0, CE) => Err(DropReason::EcnNotCapable),
        (ECT0 | ECT1, CE) => Ok(Some(inner | CE)),
        (ECT0, ECT1) => Ok(Some(inner & !ECN_MASK | ECT1)),
        _ => Ok(None),
    }
}
