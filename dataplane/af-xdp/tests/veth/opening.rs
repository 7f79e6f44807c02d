//! Opening sockets: what is refused, what is waited for, and what the error says.

use core::time::Duration;

use af_xdp::{Error, Interface, Memory, Mode, Socket, SocketOptions, Umem, UmemOptions};

use crate::lab::Lab;
use crate::port::{Port, interface, open, packet, small_umem, until};

/// Opens queue `queue` of `name` on a fresh UMEM and expects a refusal.
fn refusal(lab: &Lab, name: &str, queue: u32, options: &SocketOptions) -> Error {
    let interface = interface(lab, name);
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let opened = lab.run(|| Socket::open(&mut umem, &interface, queue, options));
    let census = umem.census();
    assert_eq!(census.free, census.frames, "a failed open keeps no frames");
    opened.expect_err("this cannot be opened")
}

#[test]
fn an_unknown_interface_is_named() {
    let lab = Lab::new();
    let error = lab
        .run(|| Interface::by_name("nowhere0"))
        .expect_err("no such interface");
    assert!(matches!(error, Error::NoInterface { .. }), "{error:?}");
    assert!(error.to_string().contains("nowhere0"), "{error}");
    let error = lab
        .run(|| Interface::by_index(4711))
        .expect_err("no such interface");
    assert!(error.to_string().contains("4711"), "{error}");

    lab.veth("a0", "b0", 1500);
    let a0 = interface(&lab, "a0");
    assert_eq!(
        lab.run(|| Interface::by_index(a0.index()))
            .expect("a0 exists"),
        a0
    );
    lab.ip("link del a0");
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let opened = lab.run(|| Socket::open(&mut umem, &a0, 0, &SocketOptions::default()));
    let error = opened.expect_err("the interface is gone");
    assert!(error.to_string().contains("a0 queue 0"), "{error}");
    assert!(error.to_string().contains("gone"), "{error}");
}

#[test]
fn a_ring_size_must_be_a_power_of_two() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    for entries in [0, 3, 100, 1 << 21] {
        let options = SocketOptions {
            tx_entries: entries,
            ..SocketOptions::default()
        };
        let error = refusal(&lab, "a0", 0, &options);
        let told = format!("tx_entries = {entries}");
        assert!(error.to_string().contains(&told), "{error}");
    }
    let options = SocketOptions {
        multi_buffer: true,
        rx_entries: 32,
        ..SocketOptions::default()
    };
    let error = refusal(&lab, "a0", 0, &options);
    assert!(error.to_string().contains("rx_entries = 32"), "{error}");
}

#[test]
fn a_mode_that_the_driver_lacks_is_refused() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let options = SocketOptions {
        mode: Mode::ZeroCopy,
        ..SocketOptions::default()
    };
    let error = refusal(&lab, "a0", 0, &options);
    assert!(matches!(error, Error::ModeRefused { .. }), "{error:?}");
    assert!(
        error.to_string().contains("a0 queue 0 in zero-copy mode"),
        "{error}"
    );

    let error = refusal(&lab, "a0", 7, &SocketOptions::default());
    assert!(error.to_string().contains("a0 queue 7"), "{error}");

    // What the first socket decided cannot be undone by the second.
    lab.veth("a1", "b1", 1500);
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let _first = open(&lab, &mut umem, "a0", &SocketOptions::default());
    let a1 = interface(&lab, "a1");
    let error = lab.run(|| Socket::open(&mut umem, &a1, 0, &options));
    let error = error.expect_err("the first socket decided copy mode");
    assert!(matches!(error, Error::Inherited { .. }), "{error:?}");
}

#[test]
fn a_busy_queue_is_waited_for_and_then_named() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let patient = SocketOptions::default();
    let hasty = SocketOptions {
        busy_wait: Duration::from_millis(20),
        ..SocketOptions::default()
    };
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let owner = open(&lab, &mut umem, "a0", &patient);
    let error = refusal(&lab, "a0", 0, &hasty);
    assert!(matches!(error, Error::QueueBusy { .. }), "{error:?}");
    assert!(error.to_string().contains("a0 queue 0"), "{error}");

    // Another socket of the same UMEM cannot have the queue either.
    let a0 = interface(&lab, "a0");
    let second = lab.run(|| Socket::open(&mut umem, &a0, 0, &hasty));
    let error = second.expect_err("the queue has a socket").to_string();
    assert!(error.contains("another existing queue"), "{error}");

    // The queue is given up some time after the socket is closed, and only when all of it is.
    let Socket {
        receiver,
        transmitter,
        handle,
    } = owner;
    drop((receiver, transmitter));
    let error = refusal(&lab, "a0", 0, &hasty);
    assert!(matches!(error, Error::QueueBusy { .. }), "{error:?}");
    drop(handle);
    for _ in 0..5 {
        drop(Port::open(&lab, "a0", &small_umem(), &patient));
    }
}

/// What a closed socket took with it is free again once its queue has another socket.
#[test]
fn reopening_a_queue_recovers_its_frames() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    lab.veth("a1", "b1", 1500);
    let options = SocketOptions::default();
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let mut other = open(&lab, &mut umem, "a1", &options);
    other.receiver.refill(&mut umem, 10);
    for _ in 0..130 {
        let mut socket = open(&lab, &mut umem, "a0", &options);
        assert_eq!(
            umem.census().free,
            512 - 10,
            "the last round's frames are back"
        );
        socket.receiver.refill(&mut umem, 100);
        let mut burst: Vec<_> = (0..20).filter_map(|n| packet(&mut umem, n, 60)).collect();
        socket.transmitter.send(&mut umem, &mut burst);
        assert_eq!(umem.census().free, 512 - 10 - 120);
    }
    drop(other);
    // With no socket left, the memory is registered anew.
    let mut last = open(&lab, &mut umem, "a1", &options);
    assert_eq!(
        umem.census().receiving,
        100,
        "those of a0, which has no socket"
    );
    last.receiver.refill(&mut umem, 10);
}

#[test]
fn an_interface_that_is_down_or_gone_is_an_error_and_not_a_hang() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let mut port = Port::open(&lab, "a0", &small_umem(), &SocketOptions::default());
    port.socket.handle.socket_error().expect("all is well");
    let mut burst = Vec::from_iter(packet(&mut port.umem, 0, 60));
    port.socket.transmitter.send(&mut port.umem, &mut burst);

    lab.ip("link set a0 down");
    let error = port
        .socket
        .transmitter
        .kick()
        .expect_err("the interface is down");
    assert!(error.to_string().contains("send on a0 queue 0"), "{error}");
    assert!(error.to_string().contains("down"), "{error}");
    assert_eq!(port.socket.transmitter.in_tx(), 1);

    lab.ip("link del a0");
    until("the socket to notice", || {
        port.socket.handle.socket_error().is_err()
    });
    port.socket
        .transmitter
        .kick()
        .expect_err("the interface is gone");
}

#[test]
fn impossible_umems_are_refused() {
    let cases = [
        (
            UmemOptions {
                frames: 0,
                ..UmemOptions::default()
            },
            "frames = 0",
        ),
        (
            UmemOptions {
                frame_size: 1024,
                ..UmemOptions::default()
            },
            "frame_size = 1024",
        ),
        (
            UmemOptions {
                frame_size: 3000,
                ..UmemOptions::default()
            },
            "frame_size = 3000",
        ),
        (
            UmemOptions {
                headroom: 1792,
                ..UmemOptions::default()
            },
            "headroom = 1792",
        ),
    ];
    for (options, told) in cases {
        let error = Umem::new(&options).expect_err("this UMEM cannot be");
        assert!(error.to_string().contains(told), "{error}");
    }
}

/// Machines have huge pages set aside or not; both are right, but silence is not.
#[test]
fn huge_pages_work_or_say_what_to_do() {
    for memory in [Memory::Anonymous, Memory::File] {
        let options = UmemOptions {
            memory,
            huge_pages: true,
            ..small_umem()
        };
        match Umem::new(&options) {
            Ok(umem) => assert_eq!(umem.census().free, 512),
            Err(error) => {
                assert!(matches!(error, Error::NoHugePages { .. }), "{error:?}");
                let told = error.to_string();
                assert!(told.contains("1 huge pages"), "{error}");
                assert!(told.contains("vm.nr_hugepages"), "{error}");
            }
        }
    }
}

/// A thread without `CAP_IPC_LOCK` may lock only as much as `RLIMIT_MEMLOCK` says.
#[test]
fn too_little_lockable_memory_names_the_limit() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let a0 = interface(&lab, "a0");
    let mut umem = Umem::new(&UmemOptions::default()).expect("memory for a UMEM");
    let opened = lab.run(|| {
        crate::lab::forgo_locked_memory();
        Socket::open(&mut umem, &a0, 0, &SocketOptions::default())
    });
    let error = opened.expect_err("8 MiB are more than the limit");
    let Error::LockedMemory { bytes, limit, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!((*bytes, *limit), (8 << 20, 64 << 10));
    assert!(
        error.to_string().contains("LimitMEMLOCK=infinity"),
        "{error}"
    );
}

/// A thread without `CAP_NET_RAW` may not open such sockets at all.
#[test]
fn a_missing_capability_is_named() {
    let lab = Lab::new();
    lab.veth("a0", "b0", 1500);
    let a0 = interface(&lab, "a0");
    let mut umem = Umem::new(&small_umem()).expect("memory for a UMEM");
    let opened = lab.run(|| {
        crate::lab::forgo_all_capabilities();
        Socket::open(&mut umem, &a0, 0, &SocketOptions::default())
    });
    let error = opened.expect_err("the thread may not");
    assert!(matches!(error, Error::NotPermitted { .. }), "{error:?}");
    assert!(error.to_string().contains("CAP_NET_RAW"), "{error}");
}
