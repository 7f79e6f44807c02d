//! Images with random damage: every lookup answers, and the checksum notices.

use core::net::Ipv4Addr;

use proptest::prelude::*;
use ripstop_fib::sync::words;
use ripstop_fib::{AdjacencyId, Image, PathsId};

use crate::example::image;

/// Under Miri everything takes a thousand times as long, and there are no files to keep failures in.
fn config() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if cfg!(miri) { 8 } else { 256 })
    }
}

/// Asks an image everything that can be asked.
fn ask_everything(image: &Image<'_>, probes: &[u64]) {
    let leases = image.leases();
    let names: usize = leases.map(|lease| lease.node_name().len()).sum();
    assert!(names <= image.size_bytes());
    let node = image.node();
    let own = node.v4.map_or(0, |local| u32::from(local.address));
    let known = [own, 0, u32::MAX];
    let adjacencies = u32::try_from(image.adjacencies()).unwrap();
    let mut found = 0;
    for id in (0..adjacencies).chain([AdjacencyId::MAX.0, u32::MAX]) {
        found += u32::from(image.template(AdjacencyId(id)).is_some());
        found += u32::from(image.long_template(AdjacencyId(id)).is_some());
        for uplink in [0, 1, 3, 4, u8::MAX] {
            image.path(PathsId(id), uplink, id.wrapping_mul(0x9e37_79b9));
        }
    }
    assert_eq!(found, adjacencies);
    for probe in probes {
        let (low, high) = (probe & 0xffff_ffff, probe >> 32);
        for part in [low, high] {
            let addr = u32::try_from(part).unwrap();
            image.lookup4(addr);
            image.lookup4(u32::from(Ipv4Addr::new(10, 244, 0, 0)) | addr & 0xffff);
            let peer = u32::from(Ipv4Addr::new(10, 199, 0, 12));
            for outer in known.into_iter().chain([addr, peer]) {
                image.check_peer4(outer, addr);
            }
        }
        let probe = u128::from(*probe);
        for outer in [probe, 0xfd00_0199 << 96 | 0x12, u128::MAX] {
            image.check_peer6(&outer.to_be_bytes(), &(probe << 40).to_be_bytes());
        }
        for addr in [probe, probe << 64, 0xfd10_0244_0002 << 80 | probe << 40] {
            image.lookup6(&addr.to_be_bytes());
        }
    }
}

proptest! {
    #![proptest_config(config())]

    /// Damage anywhere: seldom in the few words that steer, so these are hit on purpose as well.
    #[test]
    fn a_damaged_image_answers_and_is_noticed(
        bits in prop::collection::vec((any::<prop::sample::Index>(), 0u32..64), 0..4),
        replaced in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..4),
        steering in prop::collection::vec((0usize..64, 0u32..64), 0..3),
        pointers in prop::collection::vec((0usize..4, any::<u32>()), 0..3),
        probes in prop::collection::vec(any::<u64>(), 8),
    ) {
        let valid = image();
        let mut damaged = valid.clone();
        for (index, bit) in &bits { damaged[index.index(valid.len())] ^= 1 << bit; }
        for (index, value) in &replaced { damaged[index.index(valid.len())] = *value; }
        for (index, bit) in &steering { damaged[*index] ^= 1 << bit; }
        // Entries of the tables that are in use, turned into numbers of chunks that may not be there.
        for (place, value) in &pointers {
            let entry = u64::from(*value) << 32 | u64::from(*value | 1 << 31);
            damaged[[1466, 32833, 33344, 65856][*place] % valid.len()] = entry;
        }
        let shared = words(&damaged);
        match Image::attach(&shared) {
            Ok(image) => {
                ask_everything(&image, &probes);
                prop_assert_eq!(image.verify().is_ok(), damaged == valid);
            }
            Err(_) => prop_assert_ne!(damaged, valid),
        }
    }
}

/// One damaged word is always noticed, not just most probably: each step of the checksum is a bijection.
#[test]
#[cfg_attr(miri, ignore = "two thousand images are too many")]
fn every_damaged_bit_of_the_header_is_noticed() {
    let valid = image();
    let probes = [0, u64::MAX, 0x0af4_0281_0ac7_000c];
    for word in 0..64 {
        for bit in 0..64 {
            let mut damaged = valid.clone();
            damaged[word] ^= 1 << bit;
            let shared = words(&damaged);
            if let Ok(image) = Image::attach(&shared) {
                ask_everything(&image, &probes);
                assert!(image.verify().is_err(), "bit {bit} of word {word}");
            }
        }
    }
}

/// Tables that point at themselves or outside end every walk.
#[test]
#[cfg_attr(miri, ignore = "an image with tables is too large")]
fn circles_and_stray_pointers_end() {
    let valid = image();
    let entries: [u64; 4] = [1 << 31 | 1, 1 << 31, u32::MAX.into(), 1 << 31 | 0x7f_ffff];
    for entry in entries {
        let mut damaged = valid.clone();
        damaged[64..65984].fill(entry | entry << 32);
        for peers in &mut damaged[66024..66072] {
            *peers = u64::MAX;
        }
        let shared = words(&damaged);
        ask_everything(
            &Image::attach(&shared).unwrap(),
            &[0, u64::MAX, 0x1234_5678_9abc_def0],
        );
    }
}
