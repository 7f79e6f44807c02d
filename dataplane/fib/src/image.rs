//! A checked view of an image: what a worker looks packets up in.
//!
//! [`Image::attach`] checks once that every section lies inside the image and has a possible size; after that no
//! lookup can fail or read outside, whatever the words say: all indices found in the image are bounds-checked.

use core::fmt;

use crate::ABI_VERSION;
use crate::adjacency::{HEADER_MAX, LONG_HEADER_WORD, LONG_WORDS, SHORT_WORDS};
use crate::build::{
    BASE6_WORD, CHECKSUM_WORD, HEADER_WORDS, IMAGE_MAGIC, LEASE_WORDS, LeaseRecord,
    PATHS_PER_UPLINK, PATHS_WORDS, SECTION_TABLE, SECTIONS, Section,
};
use crate::checksum::checksum_words;
use crate::lpm::{self, AdjacencyId, Base6, CHUNK_WORDS, Encap, PathsId, ROOT_WORDS};
use crate::node::{Node, UPLINKS, whole};
use crate::peers::{self, BUCKET4_WORDS, BUCKET6_WORDS, PeerCheck};
use crate::prefetch::prefetch;
use crate::sync::{Ordering, Word};

pub use crate::lpm::{Hop, Leaf};

/// Why words are not an image that this version can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageError {
    /// Too few words for a header.
    Short {
        /// Words there are.
        words: usize,
    },
    /// The first word is not the magic number.
    Magic(u64),
    /// Written by a version with another layout.
    Abi {
        /// The version found.
        found: u32,
    },
    /// The length in the header is not the number of words given.
    Length {
        /// Words that the header claims.
        claimed: u64,
        /// Words there are.
        words: usize,
    },
    /// A section lies outside the image, overlaps its header, or has an impossible size.
    Section {
        /// Number of the section.
        section: usize,
    },
    /// The checksum does not match the content.
    Checksum {
        /// The checksum in the header.
        claimed: u64,
        /// The checksum of the content.
        computed: u64,
    },
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { words } => write!(
                f,
                "the table has {words} words, fewer than its header of {HEADER_WORDS}"
            ),
            Self::Magic(found) => write!(
                f,
                "the table starts with {found:#018x}, not with {IMAGE_MAGIC:#018x}"
            ),
            Self::Abi { found } => write!(
                f,
                "the table has layout version {found}, this program reads {ABI_VERSION}"
            ),
            Self::Length { claimed, words } => {
                write!(f, "the table claims {claimed} words but {words} are there")
            }
            Self::Section { section } => write!(
                f,
                "section {section} of the table has an impossible place or size"
            ),
            Self::Checksum { claimed, computed } => {
                write!(
                    f,
                    "the table's checksum is {claimed:#018x} but its content gives {computed:#018x}"
                )
            }
        }
    }
}

impl core::error::Error for ImageError {}

/// A view of an image in shared or private memory.
#[derive(Debug, Clone, Copy)]
pub struct Image<'r> {
    words: &'r [Word],
    root4: &'r [Word],
    chunks4: &'r [Word],
    root6: &'r [Word],
    chunks6: &'r [Word],
    templates: &'r [Word],
    long_templates: &'r [Word],
    paths: &'r [Word],
    peers4: &'r [Word],
    peers6: &'r [Word],
    leases: &'r [Word],
    base6: Base6,
}

/// A header of more than 64 bytes, where it lies in the image.
#[derive(Debug, Clone, Copy)]
pub struct LongTemplate<'r>(&'r [Word; LONG_WORDS]);

impl LongTemplate<'_> {
    /// Length of the header; [`HEADER_MAX`] where a damaged table claims more.
    #[inline(always)]
    pub fn length(&self) -> usize {
        let claimed = self.0[0].load(Ordering::Relaxed) & 0xff;
        (claimed as usize).min(HEADER_MAX)
    }

    /// The last [`HEADER_MAX`] bytes before the inner packet as words, first byte lowest.
    #[inline(always)]
    pub fn header(&self) -> [u64; HEADER_MAX / 8] {
        core::array::from_fn(|index| self.0[LONG_HEADER_WORD + index].load(Ordering::Relaxed))
    }
}

impl<'r> Image<'r> {
    /// Checks the header and the place of every section. Does not compute the checksum: see [`Image::verify`].
    ///
    /// # Errors
    /// When the words are no image, one of another version, or one whose sections are impossible.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "two 32-bit values are kept in a word"
    )]
    pub fn attach(words: &'r [Word]) -> Result<Self, ImageError> {
        let load = |index: usize| {
            words
                .get(index)
                .map_or(0, |word| word.load(Ordering::Relaxed))
        };
        if words.len() < HEADER_WORDS {
            return Err(ImageError::Short { words: words.len() });
        }
        if load(0) != IMAGE_MAGIC {
            return Err(ImageError::Magic(load(0)));
        }
        if load(1) != u64::from(ABI_VERSION) | ((HEADER_WORDS as u64) << 32) {
            return Err(ImageError::Abi {
                found: load(1) as u32,
            });
        }
        if load(2) != words.len() as u64 {
            return Err(ImageError::Length {
                claimed: load(2),
                words: words.len(),
            });
        }
        let mut sections: [&[Word]; SECTIONS] = [&[]; SECTIONS];
        for (section, slice) in sections.iter_mut().enumerate() {
            let place = load(SECTION_TABLE + section);
            let (start, len) = (place as u32 as usize, (place >> 32) as usize);
            let range = start..start.saturating_add(len);
            let inside = words
                .get(range)
                .filter(|found| start >= HEADER_WORDS && possible(section, found.len()));
            *slice = inside.ok_or(ImageError::Section { section })?;
        }
        let base6_bits = load(BASE6_WORD);
        let base6 = whole([load(BASE6_WORD + 1), load(BASE6_WORD + 2)]);
        // A root of 16 bits and chunks of 8 bits behind these must end at bit 128, or `lookup6` would shift too far.
        if base6_bits > 112 || !base6_bits.is_multiple_of(8) {
            return Err(ImageError::Section {
                section: Section::Root6 as usize,
            });
        }
        let [
            root4,
            chunks4,
            root6,
            chunks6,
            templates,
            long_templates,
            paths,
            peers4,
            peers6,
            leases,
        ] = sections;
        Ok(Self {
            words,
            root4,
            chunks4,
            root6,
            chunks6,
            templates,
            long_templates,
            paths,
            peers4,
            peers6,
            leases,
            base6: Base6 {
                bytes: base6_bits as usize / 8,
                mask: lpm::memory_words(&lpm::mask(base6_bits as u32).to_be_bytes()),
                addr: lpm::memory_words(&base6.to_be_bytes()),
            },
        })
    }

    /// Compares the content with the checksum: one pass over the whole image.
    ///
    /// # Errors
    /// [`ImageError::Checksum`] when they differ.
    pub fn verify(&self) -> Result<(), ImageError> {
        let claimed = self.checksum();
        let computed = checksum_words(self.words, CHECKSUM_WORD);
        if claimed == computed {
            Ok(())
        } else {
            Err(ImageError::Checksum { claimed, computed })
        }
    }

    /// The checksum in the header, which also serves as the content's fingerprint.
    pub fn checksum(&self) -> u64 {
        self.header(CHECKSUM_WORD)
    }

    /// The node that the image is for. Copies it out of shared memory: call it once per image, not per packet.
    pub fn node(&self) -> Node {
        Node::decode(|index| self.header(index))
    }

    /// Longest-prefix match of an IPv4 destination.
    #[inline]
    pub fn lookup4(&self, addr: u32) -> Hop {
        self.leaf4(addr).hop()
    }

    /// [`Image::lookup4`], not yet decoded.
    #[inline(always)]
    pub fn leaf4(&self, addr: u32) -> Leaf {
        lpm::lookup4(self.root4, self.chunks4, addr)
    }

    /// Longest-prefix match of an IPv6 destination, given by its octets.
    #[inline]
    pub fn lookup6(&self, addr: &[u8; 16]) -> Hop {
        self.leaf6(addr).hop()
    }

    /// [`Image::lookup6`], not yet decoded.
    #[inline(always)]
    pub fn leaf6(&self, addr: &[u8; 16]) -> Leaf {
        lpm::lookup6(&self.base6, self.root6, self.chunks6, addr)
    }

    /// The short template of an adjacency: the last 64 bytes before the inner packet as eight words, first byte lowest.
    /// Its lowest byte is the length of the header, unless that fills the template. `None` if there is no such
    /// adjacency.
    #[inline(always)]
    pub fn template(&self, id: AdjacencyId) -> Option<[u64; SHORT_WORDS]> {
        let words = template_words::<SHORT_WORDS>(self.templates, id)?;
        Some(core::array::from_fn(|index| {
            words[index].load(Ordering::Relaxed)
        }))
    }

    /// The long template of an adjacency ([`Encap::Vxlan4Tagged`] and [`Encap::Vxlan6`]). `None` if there is no such
    /// adjacency.
    #[inline(always)]
    pub fn long_template(&self, id: AdjacencyId) -> Option<LongTemplate<'r>> {
        template_words(self.long_templates, id).map(LongTemplate)
    }

    /// The path of a flow: `hash` is any number that is the same for all its packets and evenly spread over flows.
    #[inline]
    pub fn path(&self, id: PathsId, uplink: u8, hash: u32) -> Hop {
        let place = (u64::from(hash) * PATHS_PER_UPLINK as u64) >> 32;
        let uplink = usize::from(uplink);
        if uplink >= UPLINKS {
            return Hop::Unresolved;
        }
        let first = (id.0 as usize * UPLINKS + uplink) * PATHS_PER_UPLINK;
        match Leaf::of_entry(lpm::entry(self.paths, first + place as usize)).hop() {
            // A choice within a choice cannot exist; a damaged table that claims one reads as no route.
            Hop::Paths(_) => Hop::None,
            hop @ (Hop::None | Hop::Local | Hop::Unresolved | Hop::Via(..)) => hop,
        }
    }

    /// Whether `outer` is a peer that may send a packet with the inner source `inner`.
    #[inline(always)]
    pub fn check_peer4(&self, outer: u32, inner: u32) -> PeerCheck {
        peers::check4(self.peers4, outer, inner)
    }

    /// As [`Image::check_peer4`].
    #[inline(always)]
    pub fn check_peer6(&self, outer: &[u8; 16], inner: &[u8; 16]) -> PeerCheck {
        peers::check6(self.peers6, outer, inner)
    }

    /// Brings what [`Image::lookup4`] and [`Image::template`] will read for this destination towards the cache: the
    /// misses of a burst's packets overlap, which one after the other they would not.
    #[inline]
    pub fn prefetch_route4(&self, addr: u32) {
        self.prefetch_hop(self.lookup4(addr));
    }

    /// The same where the route leads to an adjacency of this kind: less code.
    #[inline(always)]
    pub fn prefetch_template4(&self, addr: u32, encap: Encap) {
        self.prefetch_template(self.leaf4(addr), encap);
    }

    /// As [`Image::prefetch_template4`].
    #[inline(always)]
    pub fn prefetch_template6(&self, addr: &[u8; 16], encap: Encap) {
        self.prefetch_template(self.leaf6(addr), encap);
    }

    #[inline(always)]
    fn prefetch_template(&self, leaf: Leaf, encap: Encap) {
        if let Some(id) = leaf.via(encap) {
            self.prefetch_adjacency(encap, id);
        }
    }

    /// As [`Image::prefetch_route4`].
    #[inline]
    pub fn prefetch_route6(&self, addr: &[u8; 16]) {
        self.prefetch_hop(self.lookup6(addr));
    }

    #[inline]
    fn prefetch_hop(&self, hop: Hop) {
        match hop {
            Hop::Via(encap, id) => self.prefetch_adjacency(encap, id),
            Hop::Paths(id) => prefetch(self.paths, id.0 as usize * PATHS_WORDS),
            Hop::None | Hop::Local | Hop::Unresolved => {}
        }
    }

    #[inline(always)]
    fn prefetch_adjacency(&self, encap: Encap, id: AdjacencyId) {
        if encap.is_long() {
            // The last of its two cache lines; the processor fetches neighbours in pairs.
            let last = id.0 as usize * LONG_WORDS + LONG_WORDS - 1;
            prefetch(self.long_templates, last);
        } else {
            prefetch(self.templates, id.0 as usize * SHORT_WORDS);
        }
    }

    /// The same for what [`Image::check_peer4`] will read for this outer source.
    #[inline(always)]
    pub fn prefetch_peer4(&self, outer: u32) {
        prefetch(self.peers4, peers::place4(self.peers4, outer));
    }

    /// As [`Image::prefetch_peer4`].
    #[inline(always)]
    pub fn prefetch_peer6(&self, outer: &[u8; 16]) {
        prefetch(self.peers6, peers::place6(self.peers6, outer));
    }

    /// Number of adjacencies.
    pub fn adjacencies(&self) -> usize {
        self.templates.len() / SHORT_WORDS + self.long_templates.len() / LONG_WORDS
    }

    /// The header of an adjacency as bytes, for people and tests.
    pub fn header_bytes(&self, encap: Encap, id: AdjacencyId) -> Option<alloc::vec::Vec<u8>> {
        let flat = |words: &[u64]| -> alloc::vec::Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let (bytes, length) = if encap.is_long() {
            let template = self.long_template(id)?;
            (flat(&template.header()), template.length())
        } else {
            let words = self.template(id)?;
            let length = match encap {
                Encap::Vxlan4 => SHORT_WORDS * 8,
                Encap::Vxlan4Tagged | Encap::Vxlan6 | Encap::Ipip | Encap::Udp | Encap::Direct => {
                    (words[0] & 0xff) as usize
                }
            };
            (flat(&words), length)
        };
        let start = bytes.len().checked_sub(length)?;
        Some(bytes[start..].to_vec())
    }

    /// Size of the image in bytes.
    pub fn size_bytes(&self) -> usize {
        self.words.len() * 8
    }

    /// The leases, for people.
    pub fn leases(&self) -> impl ExactSizeIterator<Item = LeaseRecord> + 'r {
        let record = |words: &[Word]| {
            LeaseRecord::decode(&core::array::from_fn(|i| words[i].load(Ordering::Relaxed)))
        };
        self.leases.chunks_exact(LEASE_WORDS).map(record)
    }

    fn header(&self, index: usize) -> u64 {
        first_word(self.words, index)
    }
}

#[inline(always)]
fn template_words<const N: usize>(templates: &[Word], id: AdjacencyId) -> Option<&[Word; N]> {
    let start = id.0 as usize * N;
    templates.get(start..start + N)?.try_into().ok()
}

#[inline(always)]
fn first_word(words: &[Word], index: usize) -> u64 {
    words
        .get(index)
        .map_or(0, |word| word.load(Ordering::Relaxed))
}

/// Whether a section may have this length in words.
fn possible(section: usize, len: usize) -> bool {
    let whole = |unit: usize| len.is_multiple_of(unit);
    const ROOT4: usize = Section::Root4 as usize;
    const ROOT6: usize = Section::Root6 as usize;
    const CHUNKS4: usize = Section::Chunks4 as usize;
    const CHUNKS6: usize = Section::Chunks6 as usize;
    const TEMPLATES: usize = Section::Templates as usize;
    const LONG_TEMPLATES: usize = Section::LongTemplates as usize;
    const PATHS: usize = Section::Paths as usize;
    const PEERS4: usize = Section::Peers4 as usize;
    const PEERS6: usize = Section::Peers6 as usize;
    let hash_table = |unit: usize| len == 0 || (whole(unit) && (len / unit).is_power_of_two());
    match section {
        ROOT4 | ROOT6 => len == 0 || len == ROOT_WORDS,
        CHUNKS4 | CHUNKS6 => whole(CHUNK_WORDS),
        TEMPLATES => whole(SHORT_WORDS),
        LONG_TEMPLATES => whole(LONG_WORDS),
        PATHS => whole(PATHS_WORDS),
        PEERS4 => hash_table(BUCKET4_WORDS),
        PEERS6 => hash_table(BUCKET6_WORDS),
        _ => whole(LEASE_WORDS),
    }
}
