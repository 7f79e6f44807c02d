//! The memory contract.
