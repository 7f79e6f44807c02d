//! Real sockets on veth pairs in private network namespaces. Needs root; `../README.md` has the
//! drawings.

mod checksum;
mod lab;
mod multi_buffer;
mod opening;
mod port;
mod traffic;
