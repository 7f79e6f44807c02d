//! Brings a word towards the cache without waiting for it.
#![expect(unsafe_code, reason = "the processor's prefetch is an intrinsic")]

use crate::sync::Word;

/// Starts to load the cache line of `words[index]`, if there is such a word. A load that waits would keep the processor
/// from looking further ahead than some eight packets; this does not.
#[inline(always)]
pub(crate) fn prefetch(words: &[Word], index: usize) {
    let Some(word) = words.get(index) else {
        return;
    };
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees and faults on no address; this one is valid besides.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(core::ptr::from_ref(word).cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        core::hint::black_box(word.load(crate::sync::Ordering::Relaxed));
    }
}
