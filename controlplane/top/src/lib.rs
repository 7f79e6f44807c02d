//! What workers do, live.
//!
//! ```text
//!   stats region ─► Snapshot ─┐
//!                             ├─► Rates::between ─► Panel ─► terminal, text, or any part of another program's screen
//!   a moment ago ─► Snapshot ─┘    (pure)            (pure)
//! ```
//!
//! A crate of its own, since both `ripstop top` and the perf harness show it, and the harness does not know the control
//! plane. It knows nothing but the stats region; no process is asked, and no worker notices.

mod panel;
mod rates;
mod snapshot;
mod table;
pub mod terminal;

pub use panel::{Asked, Order, Panel, View};
pub use rates::{Count, Figures, Flow, Frames, HEARTBEAT_MAX, Nic, Rates, Worker};
pub use snapshot::{DataPlane, Snapshot};
