//! The checksum of an image: finds a torn or damaged image, not a forged one (only root writes the region).

use crate::sync::{Ordering, Word};

const LANES: usize = 4;
const PRIME: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / golden ratio, odd

/// Four independent lanes, so that the multiplications overlap: about one word per cycle.
pub(crate) fn checksum_values(values: impl Iterator<Item = u64>) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    let mut count = 0usize;
    for value in values {
        let lane = &mut lanes[count % LANES];
        *lane = (*lane ^ value).wrapping_mul(PRIME).rotate_left(31);
        count += 1;
    }
    let mut sum = count as u64;
    for lane in lanes {
        sum = (sum ^ lane).wrapping_mul(PRIME);
        sum ^= sum >> 29;
    }
    sum
}

/// Checksum of shared words, leaving out the word at `skip` (where the checksum itself is kept).
pub(crate) fn checksum_words(words: &[Word], skip: usize) -> u64 {
    let value = |(index, word): (usize, &Word)| {
        if index == skip {
            0
        } else {
            word.load(Ordering::Relaxed)
        }
    };
    checksum_values(words.iter().enumerate().map(value))
}

/// Checksum of an image that is still private memory.
pub(crate) fn checksum_image(image: &[u64], skip: usize) -> u64 {
    checksum_values(
        image
            .iter()
            .enumerate()
            .map(|(index, value)| if index == skip { 0 } else { *value }),
    )
}
