//! What is refused, and in which words: every message says what was found and what was expected.

use crate::example::{self, image};
use ripstop_fib::publish::{PublishError, region_words};
use ripstop_fib::stats::{STATS_WORDS, Stats};
use ripstop_fib::sync::words;
use ripstop_fib::{BuildError, Image, ImageBuilder, Publisher, Region, Route, Word};

/// Words that replace valid ones, and a part of what is said about the result.
type Case = (&'static [(usize, u64)], &'static str);

fn replaced(valid: &[u64], replacements: &[(usize, u64)]) -> Vec<Word> {
    let mut values = valid.to_vec();
    for (index, value) in replacements {
        values[*index] = *value;
    }
    words(&values)
}

/// The word of a section table: start and length, both in words.
const fn place(start: u64, len: u64) -> u64 {
    start | len << 32
}

#[test]
fn an_image_with_an_impossible_header_is_refused() {
    let end = image().len() as u64;
    const CASES: &[Case] = &[
        (
            &[(0, 0)],
            "starts with 0x0000000000000000, not with 0x31474d4953504952",
        ),
        (
            &[(1, place(1, 32))],
            "layout version 1, this program reads 2",
        ),
        (
            &[(1, place(2, 72))],
            "layout version 2, this program reads 2",
        ),
        (&[(2, 5)], "the table claims 5 words but"),
        (&[(2, u64::MAX)], "claims 18446744073709551615 words but"),
        // Inside the header, behind the end, with an end that does not fit a word, of half a table.
        (&[(16, place(0, 0x8000))], "section 0 of the table"),
        (
            &[(16, place(0xffff_ffff, 0x8000))],
            "section 0 of the table",
        ),
        (&[(16, u64::MAX)], "section 0 of the table"),
        (&[(16, place(64, 0x4000))], "section 0 of the table"),
        (&[(17, place(64, 127))], "section 1 of the table"),
        (&[(18, place(64, 1))], "section 2 of the table"),
        (&[(19, place(64, 129))], "section 3 of the table"),
        (&[(20, place(64, 7))], "section 4 of the table"),
        (&[(21, place(64, 8))], "section 5 of the table"),
        (&[(22, place(64, 23))], "section 6 of the table"),
        // Buckets of two words and of eight, a power of two of them.
        (&[(23, place(64, 3))], "section 7 of the table"),
        (&[(23, place(64, 6))], "section 7 of the table"),
        (&[(24, place(64, 4))], "section 8 of the table"),
        (&[(24, place(64, 24))], "section 8 of the table"),
        (&[(25, place(64, 11))], "section 9 of the table"),
        // The root behind the shared bits must end on a byte, and chunks of 8 bits at bit 128.
        (&[(7, 113)], "section 2 of the table"),
        (&[(7, 120)], "section 2 of the table"),
        (&[(7, 105)], "section 2 of the table"),
        (&[(7, u64::MAX)], "section 2 of the table"),
    ];
    for (replacements, expected) in CASES {
        let damaged = replaced(&image(), replacements);
        let error = Image::attach(&damaged).unwrap_err().to_string();
        assert!(error.contains(expected), "{replacements:x?}: {error}");
    }
    let valid = image();
    let length = format!("the table claims {end} words but {} are there", end - 1);
    let cut = words(&valid[..valid.len() - 1]);
    assert_eq!(Image::attach(&cut).unwrap_err().to_string(), length);
    for count in [0, 1, 63] {
        let error = Image::attach(&words(&valid[..count])).unwrap_err();
        let expected = format!("the table has {count} words, fewer than its header of 64");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn a_wrong_checksum_names_both() {
    let damaged = replaced(&image(), &[(3, 1)]);
    let error = Image::attach(&damaged).unwrap().verify().unwrap_err();
    let error = error.to_string();
    assert!(error.contains("the table's checksum is 0x0000000000000001 but its content gives 0x"));
}

#[test]
fn a_fib_region_with_an_impossible_header_is_refused() {
    let formatted = words(&vec![0; region_words(2, 8)]);
    Region::format(&formatted, 2, 8);
    let valid = example::values(&formatted);
    const CASES: &[Case] = &[
        (
            &[(0, 7)],
            "wrong magic: starts with 0x0000000000000007, a region of this kind with 0x3142494653504952",
        ),
        (&[(1, 1)], "layout version 1, this program uses version 2"),
        (&[(1, u64::MAX)], "this program uses version 2"),
        (&[(2, 0)], "header claims 0 words, the region has 528"),
        (&[(2, 529)], "header claims 529 words, the region has 528"),
        // Numbers of slots and sizes of slots whose product would be right, too large, or overflow.
        (&[(3, 0)], "header claims 528 words"),
        (&[(3, 1), (4, 16)], "header claims 528 words"),
        (&[(3, 16), (4, 1)], "header claims 528 words"),
        (&[(3, u64::MAX)], "header claims 528 words"),
        (&[(4, 9)], "header claims 528 words"),
        (&[(4, u64::MAX)], "header claims 528 words"),
        (&[(4, 1 << 63 | 8)], "header claims 528 words"),
        (&[(3, 8), (4, (1 << 61) + 2)], "header claims 528 words"),
    ];
    for (replacements, expected) in CASES {
        let damaged = replaced(&valid, replacements);
        let error = Region::attach(&damaged).unwrap_err().to_string();
        assert!(error.contains(expected), "{replacements:x?}: {error}");
    }
    for count in (0..valid.len()).step_by(if cfg!(miri) { 67 } else { 1 }) {
        let error = Region::attach(&words(&valid[..count])).unwrap_err();
        let error = error.to_string();
        let expected = if count == 0 { "wrong magic" } else { "" };
        assert!(error.contains(expected), "{count} words: {error}");
    }
    assert!(Region::attach(&formatted).is_ok());
}

#[test]
fn a_stats_region_with_an_impossible_header_is_refused() {
    let formatted = words(&vec![0; STATS_WORDS]);
    Stats::format(&formatted, 4711, 0);
    let valid = example::values(&formatted);
    const CASES: &[Case] = &[
        (
            &[(0, 0x3142_4946_5350_4952)],
            "starts with 0x3142494653504952, a region of this kind with 0x3141545353504952",
        ),
        (&[(1, 0)], "layout version 0, this program uses version 2"),
        (&[(2, 1)], "header claims 1 words, the region has 17024"),
    ];
    for (replacements, expected) in CASES {
        let damaged = replaced(&valid, replacements);
        let error = Stats::attach(&damaged).unwrap_err().to_string();
        assert!(error.contains(expected), "{replacements:x?}: {error}");
    }
    for count in [0, 1, 2, 24, STATS_WORDS - 1] {
        assert!(Stats::attach(&words(&valid[..count])).is_err(), "{count}");
    }
}

/// Whatever the words say, a reader of the stats region gets an answer.
#[test]
fn a_damaged_stats_region_is_read_without_panic() {
    let valid = words(&vec![u64::MAX; STATS_WORDS]);
    let stats = Stats::format(&valid, 1, 1);
    stats.announce(usize::MAX, usize::MAX);
    let (workers, nics) = (stats.workers(), stats.nics());
    assert_eq!((workers.len(), nics.len()), (64, 16));
    assert_eq!(workers[63].counters.drops_total(), u64::MAX);
    assert_eq!(stats.accepted_generation(), u64::MAX >> 8);
    assert_eq!(stats.pins().len(), 66);
}

#[test]
fn what_cannot_be_built_or_published_is_refused() {
    let net = core::net::Ipv4Addr::new(10, 244, 2, 1);
    let build = |fill: fn(&mut ImageBuilder, core::net::Ipv4Addr)| {
        let mut builder = example::builder();
        fill(&mut builder, net);
        builder.build().unwrap_err().to_string()
    };
    let cases: [(String, &str); 9] = [
        (
            build(|builder, net| builder.route4(net, 33, Route::Local)),
            "prefix length 33 is longer than 32",
        ),
        (
            build(|builder, net| builder.peer4(net, net, 24)),
            "address 0xaf40201 has bits set behind its prefix of 24",
        ),
        (
            build(|builder, _| builder.route6(core::net::Ipv6Addr::LOCALHOST, 129, Route::Local)),
            "prefix length 129 is longer than 128",
        ),
        (
            build(|builder, net| {
                builder.route4(net, 32, Route::Via(ripstop_fib::AdjacencyId(3)));
            }),
            "a route names adjacency 3, which was not added",
        ),
        (
            build(|builder, net| {
                builder.route4(net, 32, Route::Paths(ripstop_fib::PathsId(1)));
            }),
            "a route names the paths 1, which were not added",
        ),
        (
            build(|builder, _| {
                builder.paths(&[(4, ripstop_fib::AdjacencyId(0))]);
            }),
            "uplink 4 is one too many, the numbers are below 4",
        ),
        (
            build(|builder, _| {
                builder.paths(&[(0, ripstop_fib::AdjacencyId(0)); 13]);
            }),
            "13 paths through one uplink are more than 12",
        ),
        (
            build(|builder, _| {
                builder.paths(&[(0, ripstop_fib::AdjacencyId(9))]);
            }),
            "a route names adjacency 9, which was not added",
        ),
        (
            BuildError::Vni(1 << 24).to_string(),
            "VNI 16777216 does not fit 24 bits",
        ),
    ];
    for (error, expected) in cases {
        assert_eq!(error, expected);
    }
    let mut node = example::node();
    node.vni = 1 << 24;
    assert_eq!(
        ImageBuilder::new(node).build(),
        Err(BuildError::Vni(1 << 24))
    );

    let region = words(&vec![0; region_words(2, 256)]);
    let region = Region::format(&region, 2, 256);
    let error = Publisher::adopt(region)
        .publish(&[0; 384], Vec::new)
        .unwrap_err();
    assert_eq!(
        error,
        PublishError::TooLarge {
            words: 384,
            slot_words: 256
        }
    );
    assert_eq!(
        error.to_string(),
        "the table has 3 KiB, the region holds 2 KiB"
    );
    assert_eq!(
        region.current().load(ripstop_fib::sync::Ordering::Relaxed),
        0
    );
}
