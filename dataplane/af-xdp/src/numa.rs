//! On which NUMA node memory lies.
//!
//! Memory is placed when it is touched first, by the policy of the thread that touches it, and stays there. So the
//! policy is changed while memory is mapped (mappings are populated at once) and put back afterwards. A node is
//! preferred and not insisted on: where it is full, the memory of another node is slower, while a page that cannot be
//! had at all ends the process with SIGBUS. Who wants to know asks where the pages are.
#![expect(unsafe_code, reason = "libc has no wrappers for these system calls")]

use core::ffi::{c_int, c_long, c_ulong, c_void};
use core::ptr;

use crate::mapping::Mapping;

/// Most nodes that a kernel can be built for (CONFIG_NODES_SHIFT is at most 10).
const NODES: usize = 1024;
/// One more than the bits: the kernel takes the number for one too high (mm/mempolicy.c, get_nodes).
const MAX_NODE: c_ulong = NODES as c_ulong + 1;

/// A policy of memory placement: its mode and its nodes.
struct Policy {
    mode: c_int,
    nodes: [c_ulong; NODES / c_ulong::BITS as usize],
}

impl Policy {
    /// Prefers `node`; `None` if no kernel has such a node.
    fn prefer(node: u32) -> Option<Self> {
        let mut policy = Self {
            mode: libc::MPOL_PREFERRED,
            nodes: Default::default(),
        };
        let word = policy.nodes.get_mut((node / c_ulong::BITS) as usize)?;
        *word = 1 << (node % c_ulong::BITS);
        Some(policy)
    }

    /// That of the calling thread.
    fn of_thread() -> Option<Self> {
        let mut policy = Self {
            mode: 0,
            nodes: Default::default(),
        };
        // SAFETY: the kernel writes one int and at most `MAX_NODE - 1` bits, for which there is room.
        let status = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut policy.mode,
                policy.nodes.as_mut_ptr(),
                MAX_NODE,
                ptr::null::<c_void>(),
                0,
            )
        };
        (status == 0).then_some(policy)
    }

    /// Makes it that of the calling thread; `false` if the kernel refuses.
    fn apply(&self) -> bool {
        // SAFETY: the kernel reads at most `MAX_NODE - 1` bits, which are there.
        let status = unsafe {
            libc::syscall(
                libc::SYS_set_mempolicy,
                self.mode,
                self.nodes.as_ptr(),
                MAX_NODE,
            )
        };
        status == 0
    }
}

/// Does `map` in such a way that memory which it touches lies on `node`, as far as that can be had.
pub(crate) fn on_node<T>(node: Option<u32>, map: impl FnOnce() -> T) -> T {
    let Some(wanted) = node.and_then(Policy::prefer) else {
        return map();
    };
    let before = Policy::of_thread();
    let changed = before.is_some() && wanted.apply();
    let mapped = map();
    if changed {
        before.inspect(|before| {
            before.apply();
        });
    }
    mapped
}

/// The node that every page of `memory` lies on.
pub(crate) fn node_of(memory: &Mapping, page_bytes: usize) -> Option<u32> {
    let base = memory.base().as_ptr();
    let pages: Vec<*const c_void> = (0..memory.len())
        .step_by(page_bytes)
        .map(|offset| base.wrapping_add(offset).cast_const().cast())
        .collect();
    let mut nodes: Vec<c_int> = vec![-1; pages.len()];
    let this_process: c_int = 0;
    let count = c_ulong::try_from(pages.len()).ok()?;
    // SAFETY: both arrays have as many entries as stated. Without target nodes the call moves nothing: it only writes
    // down where each page is.
    let status: c_long = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            this_process,
            count,
            pages.as_ptr(),
            ptr::null::<c_int>(),
            nodes.as_mut_ptr(),
            0,
        )
    };
    let (first, rest) = nodes.split_first()?;
    let node = u32::try_from(*first).ok().filter(|_| status == 0)?;
    rest.iter().all(|node| node == first).then_some(node)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    fn mapping() -> Mapping {
        Mapping::anonymous(64 << 12, 0).expect("a few pages of memory")
    }

    #[test]
    fn memory_lies_where_it_was_wanted() {
        // Every machine has a node 0, and some have only that.
        let on_first = on_node(Some(0), mapping);
        assert_eq!(node_of(&on_first, 4096), Some(0));
    }

    #[test]
    fn a_node_that_does_not_exist_is_no_obstacle() {
        for node in [1000, 1023, 1024, u32::MAX] {
            let elsewhere = on_node(Some(node), mapping);
            assert!(node_of(&elsewhere, 4096).is_none_or(|found| found != node));
        }
    }

    #[test]
    fn the_policy_of_the_thread_is_as_before() {
        let policy = || Policy::of_thread().map(|policy| (policy.mode, policy.nodes));
        let before = policy();
        assert!(before.is_some());
        let within = on_node(Some(0), policy).unwrap();
        assert_eq!((within.0, within.1[0]), (libc::MPOL_PREFERRED, 1));
        assert_eq!(policy(), before);
    }
}
