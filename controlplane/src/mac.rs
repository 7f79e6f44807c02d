//! An Ethernet address, as leases, links and neighbour entries carry it.

use core::fmt;
use core::str::FromStr;

/// A 48-bit Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mac(pub [u8; 6]);

/// The text is not six pairs of hexadecimal digits separated by colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: write six pairs of hexadecimal digits, like 02:52:53:00:00:01")]
pub struct MacParseError;

impl Mac {
    /// All six bytes are zero: no address at all.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 6]
    }

    /// The group bit is set: multicast or broadcast, never one station.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Reads an address from the value of a netlink attribute.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

impl FromStr for Mac {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or(MacParseError)?;
            let digits = part.as_bytes();
            if digits.len() != 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
                return Err(MacParseError);
            }
            *byte = u8::from_str_radix(part, 16).or(Err(MacParseError))?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(MacParseError),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let mac: Mac = "02:52:53:00:0a:FF".parse().unwrap();
        assert_eq!(mac, Mac([2, 0x52, 0x53, 0, 10, 255]));
        assert_eq!(mac.to_string(), "02:52:53:00:0a:ff");
    }

    #[test]
    fn refuses_everything_else() {
        for text in [
            "",
            "02",
            "02:52:53:00:00",
            "02:52:53:00:00:01:02",
            "2:52:53:00:00:01",
            "+2:52:53:00:00:01",
            "0g:52:53:00:00:01",
        ] {
            assert_eq!(text.parse::<Mac>(), Err(MacParseError), "{text:?}");
        }
    }
}
