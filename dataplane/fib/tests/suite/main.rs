//! What the crate promises, apart from lookups (`tests/image.rs`) and orderings (`src/publish/loom_model.rs`).
#![expect(
    clippy::unwrap_used,
    reason = "a test fails where it stands, also in its helpers"
)]

mod damage;
mod errors;
mod example;
mod golden;
#[cfg(feature = "map")]
mod map;
mod publish;
mod read_only;
