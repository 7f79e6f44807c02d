//! A small synchronous netlink client: batches of requests, dumps, and a multicast monitor.
//!
//! Requests are built with `netlink-packet-route`. Replies are read with our own field offsets instead
//! of its message types: a snapshot may hold tens of thousands of entries, of which three
//! fields each are wanted, and a link of a kind that the library cannot parse must not hide the others.
//!
//! Fifteen thousand requests go out in a few hundred sends. Only the last request of a batch asks for an
//! acknowledgement: the kernel answers a failure in any case, and success needs no message.

pub mod message;
pub mod monitor;

use core::net::IpAddr;
use core::time::Duration;
use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::sys::{borrow_netlink, force_receive_buffer, wait_readable};
use message::{Route, RouteAnswer, u16_at, u32_at};

/// Requests sent together. The kernel works them off before `send` returns, so replies wait in the receive
/// buffer: 512 acknowledgements of under 1 KiB, or 64 route replies of up to 8 KiB.
const BATCH_REQUESTS: usize = 512;
const BATCH_LOOKUPS: usize = 64;
/// Below the default send buffer of 208 KiB.
const BATCH_BYTES: usize = 64 << 10;
const RECEIVE_BUFFER: i32 = 4 << 20;
/// The kernel fills dump messages up to 32 KiB.
const MESSAGE_MAX: usize = 64 << 10;
/// The kernel answers in microseconds; longer means that a reply was lost.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a conversation with the kernel failed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket cannot be made or set up.
    #[error("netlink: {step}: {source}: run as root or with CAP_NET_ADMIN")]
    Open {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// A system call on the socket failed.
    #[error("netlink: {step}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// The kernel refused a dump.
    #[error("netlink: list {what}: {refusal}")]
    Dump {
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        refusal: Refusal,
    },
    /// A reply did not come.
    #[error("netlink: no reply within {} s", REPLY_TIMEOUT.as_secs())]
    Timeout,
    /// The receive buffer overflowed; what was missed must be read again.
    #[error("netlink: replies were lost, the receive buffer is too small")]
    Overrun,
}

/// The kernel's "no" to one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Error number, positive.
    pub errno: i32,
    /// The kernel's explanation, where it gives one.
    pub explanation: Option<String>,
}

impl core::fmt::Display for Refusal {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.errno))?;
        match &self.explanation {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

/// One change for the kernel to make.
#[derive(Debug, Clone)]
pub struct Request {
    /// The message.
    pub message: RouteNetlinkMessage,
    /// `NLM_F_*` flags beyond `NLM_F_REQUEST`.
    pub flags: u16,
}

/// A request that failed, by its place in the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Index of the request.
    pub index: usize,
    /// Why.
    pub refusal: Refusal,
}

/// A connection to the kernel's routing subsystem, in the network namespace of the thread that opened it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl core::fmt::Debug for Netlink {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Netlink")
            .field("fd", &self.socket.as_raw_fd())
            .finish_non_exhaustive()
    }
}

fn open_socket(protocol: isize) -> Result<Socket, NetlinkError> {
    let step = |step| move |source| NetlinkError::Open { step, source };
    let mut socket = Socket::new(protocol).map_err(step("open socket"))?;
    socket.bind_auto().map_err(step("bind socket"))?;
    force_receive_buffer(&socket, RECEIVE_BUFFER).map_err(step("enlarge receive buffer"))?;
    Ok(socket)
}

impl Netlink {
    /// Opens a connection.
    pub fn open() -> Result<Self, NetlinkError> {
        let socket = open_socket(NETLINK_ROUTE)?;
        let step = |step| move |source| NetlinkError::Open { step, source };
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(step("connect socket"))?;
        // Without these, errors carry no text and dumps cannot be narrowed to one table or device.
        socket
            .set_ext_ack(true)
            .map_err(step("ask for explanations"))?;
        socket
            .set_cap_ack(true)
            .map_err(step("ask for short replies"))?;
        socket
            .set_netlink_get_strict_chk(true)
            .map_err(step("ask for strict dumps"))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(MESSAGE_MAX),
        })
    }

    /// Sends all requests; the failures, in order. One failure does not keep the others from being tried.
    pub fn execute(&mut self, requests: &[Request]) -> Result<Vec<Failure>, NetlinkError> {
        let mut failures = Vec::new();
        let mut done = 0;
        while done < requests.len() {
            let first_sequence = self.sequence.wrapping_add(1);
            let mut batch = Vec::with_capacity(BATCH_BYTES);
            let mut count = 0;
            let mut last_start = 0;
            for request in requests[done..].iter().take(BATCH_REQUESTS) {
                if batch.len() > BATCH_BYTES {
                    break;
                }
                last_start = batch.len();
                self.encode(&request.message, NLM_F_REQUEST | request.flags, &mut batch);
                count += 1;
            }
            set_flag(&mut batch[last_start..], NLM_F_ACK);
            self.send(&batch)?;
            let last_sequence = self.sequence;
            let mut acknowledged = false;
            while !acknowledged {
                self.receive(|kind, sequence, _, payload| {
                    if kind != NLMSG_ERROR {
                        return;
                    }
                    let offset = sequence.wrapping_sub(first_sequence) as usize;
                    if offset >= count {
                        return;
                    }
                    if let Some(refusal) = refusal(payload) {
                        failures.push(Failure {
                            index: done + offset,
                            refusal,
                        });
                    }
                    acknowledged |= sequence == last_sequence;
                })?;
            }
            done += count;
        }
        Ok(failures)
    }

    /// Sends one request.
    pub fn execute_one(&mut self, request: Request) -> Result<Result<(), Refusal>, NetlinkError> {
        let mut failures = self.execute(&[request])?;
        Ok(failures
            .pop()
            .map_or(Ok(()), |failure| Err(failure.refusal)))
    }

    /// Asks the routing tables, rules included, how packets of a transport protocol would reach each destination.
    pub fn lookup_routes(
        &mut self,
        source: IpAddr,
        destinations: &[IpAddr],
        protocol: u8,
    ) -> Result<Vec<Result<RouteAnswer, Refusal>>, NetlinkError> {
        let mut answers = Vec::with_capacity(destinations.len());
        for chunk in destinations.chunks(BATCH_LOOKUPS) {
            let first_sequence = self.sequence.wrapping_add(1);
            let mut batch = Vec::with_capacity(chunk.len() * 64);
            for &destination in chunk {
                self.encode(
                    &message::lookup_route(source, destination, protocol),
                    NLM_F_REQUEST,
                    &mut batch,
                );
            }
            self.send(&batch)?;
            let mut chunk_answers: Vec<Option<Result<RouteAnswer, Refusal>>> =
                vec![None; chunk.len()];
            let mut missing = chunk.len();
            while missing > 0 {
                self.receive(|kind, sequence, _, payload| {
                    let offset = sequence.wrapping_sub(first_sequence) as usize;
                    let Some(slot) = chunk_answers.get_mut(offset) else {
                        return;
                    };
                    let answer = match kind {
                        NLMSG_ERROR => refusal(payload).map(Err),
                        message::RTM_NEWROUTE => RouteAnswer::parse(payload).map(Ok),
                        _ => None,
                    };
                    if let (None, Some(answer)) = (&slot, answer) {
                        *slot = Some(answer);
                        missing -= 1;
                    }
                })?;
            }
            answers.extend(chunk_answers.into_iter().flatten());
        }
        Ok(answers)
    }

    /// How the node's own packets would reach an address: by which interface, and from which of our addresses.
    pub fn route_to(
        &mut self,
        destination: IpAddr,
    ) -> Result<Option<(u32, Option<IpAddr>)>, NetlinkError> {
        let mut request = Vec::new();
        self.encode(&message::route_to(destination), NLM_F_REQUEST, &mut request);
        let wanted = self.sequence;
        self.send(&request)?;
        let mut answer = None;
        while answer.is_none() {
            self.receive(|kind, sequence, _, payload| {
                if sequence == wanted {
                    // A refusal, and a route that refuses, lead nowhere.
                    let route =
                        (kind == message::RTM_NEWROUTE).then(|| Route::parse_answer(payload));
                    let route = route.flatten();
                    answer = Some(route.map(|route| (route.link, route.source)));
                }
            })?;
        }
        Ok(answer.flatten())
    }

    /// Lists objects: `each` gets the payload of every message of type `kind`. The kernel's "no such table" is an
    /// empty list.
    pub fn dump(
        &mut self,
        what: &'static str,
        request: &RouteNetlinkMessage,
        kind: u16,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), NetlinkError> {
        let mut batch = Vec::new();
        self.encode(request, NLM_F_REQUEST | NLM_F_DUMP, &mut batch);
        self.send(&batch)?;
        let wanted = self.sequence;
        let mut end = None;
        while end.is_none() {
            self.receive(|message_kind, sequence, flags, payload| {
                if sequence != wanted || end.is_some() {
                    return;
                }
                // An interrupted dump is incomplete at worst; what it misses is found by the next look.
                let _interrupted = flags & NLM_F_DUMP_INTR;
                match message_kind {
                    NLMSG_DONE | NLMSG_ERROR => end = Some(refusal(payload)),
                    other if other == kind => each(payload),
                    _ => {}
                }
            })?;
        }
        match end.flatten() {
            Some(refusal) if refusal.errno != libc::ENOENT => {
                Err(NetlinkError::Dump { what, refusal })
            }
            _ => Ok(()),
        }
    }

    fn encode(&mut self, message: &RouteNetlinkMessage, flags: u16, batch: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::new(
            netlink_packet_core::NetlinkHeader::default(),
            NetlinkPayload::InnerMessage(message.clone()),
        );
        message.header.flags = flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = batch.len();
        batch.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut batch[start..]);
    }

    fn send(&self, batch: &[u8]) -> Result<(), NetlinkError> {
        match self.socket.send(batch, 0) {
            Ok(_) => Ok(()),
            Err(source) => Err(NetlinkError::Io {
                step: "send",
                source,
            }),
        }
    }

    /// Receives one datagram and calls `each` with type, sequence number, flags and payload of its messages.
    fn receive(&mut self, each: impl FnMut(u16, u32, u16, &[u8])) -> Result<(), NetlinkError> {
        loop {
            if receive_into(&self.socket, &mut self.buffer)? {
                for_each_message(&self.buffer, each);
                return Ok(());
            }
            if wait_readable([borrow_netlink(&self.socket)], REPLY_TIMEOUT) == [false] {
                return Err(NetlinkError::Timeout);
            }
        }
    }
}

/// A plain conversation with one of the kernel's other netlink families, for messages that are written by hand.
pub(crate) struct Talk {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl core::fmt::Debug for Talk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Talk").finish_non_exhaustive()
    }
}

impl Talk {
    pub(crate) fn open(protocol: isize) -> Result<Self, NetlinkError> {
        let socket = open_socket(protocol)?;
        let step = |step| move |source| NetlinkError::Open { step, source };
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(step("connect socket"))?;
        socket
            .set_ext_ack(true)
            .map_err(step("ask for explanations"))?;
        socket
            .set_cap_ack(true)
            .map_err(step("ask for short replies"))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: Vec::with_capacity(MESSAGE_MAX),
        })
    }

    /// Sends one message and reads the answer to its end: `each` gets the payloads, the result is the kernel's "no".
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        payload: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<Option<Refusal>, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let wanted = self.sequence;
        let length = u32::try_from(16 + payload.len()).unwrap_or(u32::MAX);
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(wanted.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(payload);
        let io = |step| move |source| NetlinkError::Io { step, source };
        self.socket.send(&message, 0).map_err(io("send"))?;
        let mut end = None;
        while end.is_none() {
            if !receive_into(&self.socket, &mut self.buffer)? {
                if wait_readable([borrow_netlink(&self.socket)], REPLY_TIMEOUT) == [false] {
                    return Err(NetlinkError::Timeout);
                }
                continue;
            }
            for_each_message(&self.buffer, |kind, sequence, _, payload| {
                if sequence != wanted || end.is_some() {
                    return;
                }
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => end = Some(refusal(payload)),
                    _ => each(payload),
                }
            });
        }
        Ok(end.flatten())
    }
}

/// Receives one datagram without waiting; false when there is none.
fn receive_into(socket: &Socket, buffer: &mut Vec<u8>) -> Result<bool, NetlinkError> {
    buffer.clear();
    buffer.reserve(MESSAGE_MAX);
    match socket.recv(buffer, libc::MSG_DONTWAIT) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Err(NetlinkError::Overrun),
        Err(source) => Err(NetlinkError::Io {
            step: "receive",
            source,
        }),
    }
}

fn for_each_message(mut bytes: &[u8], mut each: impl FnMut(u16, u32, u16, &[u8])) {
    // struct nlmsghdr: length, type and flags, sequence number, port (RFC 3549 section 2.2).
    while let (Some(length), Some(kind), Some(flags), Some(sequence)) = (
        u32_at(bytes, 0),
        u16_at(bytes, 4),
        u16_at(bytes, 6),
        u32_at(bytes, 8),
    ) {
        let length = length as usize;
        let Some(payload) = bytes.get(16..length) else {
            return;
        };
        each(kind, sequence, flags, payload);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn set_flag(message: &mut [u8], flag: u16) {
    if let Some(bytes) = message.get_mut(6..8) {
        let flags = u16::from_ne_bytes([bytes[0], bytes[1]]) | flag;
        bytes.copy_from_slice(&flags.to_ne_bytes());
    }
}

/// Reads the payload of `NLMSG_ERROR` or `NLMSG_DONE`; `None` is success.
fn refusal(payload: &[u8]) -> Option<Refusal> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let code = u32_at(payload, 0)?.cast_signed();
    if code == 0 {
        return None;
    }
    // struct nlmsgerr: the code, the header of the request (capped, see `open`), attributes.
    let explanation = payload.get(20..).and_then(|attributes| {
        message::attributes(attributes)
            .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
            .map(|(_, text)| {
                String::from_utf8_lossy(text)
                    .trim_end_matches('\0')
                    .to_owned()
            })
    });
    Some(Refusal {
        errno: code.wrapping_neg(),
        explanation,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_any_length_are_walked_without_panic() {
        let mut bytes = vec![0; 40];
        bytes[0] = 20;
        bytes[20] = 20;
        let mut count = 0;
        for_each_message(&bytes, |_, _, _, payload| {
            assert_eq!(payload.len(), 4);
            count += 1;
        });
        assert_eq!(count, 2);
        for length in 0..40 {
            for_each_message(&bytes[..length], |_, _, _, _| {});
            bytes[0] = u8::try_from(length).unwrap();
            for_each_message(&bytes, |_, _, _, _| {});
        }
    }

    #[test]
    fn a_refusal_carries_the_kernels_text() {
        let mut payload = (-17i32).to_ne_bytes().to_vec();
        payload.extend([0; 16]);
        payload.extend([9, 0, 1, 0]);
        payload.extend(b"Oops\0\0\0\0");
        let refusal = refusal(&payload).unwrap();
        assert_eq!(
            refusal,
            Refusal {
                errno: 17,
                explanation: Some("Oops".to_owned())
            }
        );
    }
}
