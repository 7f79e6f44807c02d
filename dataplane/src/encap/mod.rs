//! The encapsulations: one module each, straight-line and pure. `forward` decides which applies.

pub mod vxlan;
