//! The regions as files, and the locks. Other processes are this test binary again, running one test that waits.

use core::sync::atomic::{AtomicU32, Ordering};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use ripstop_fib::map::{
    self, CONTROLPLANE_LOCK, DATAPLANE_LOCK, FIB_FILE, MapError, ProcessLock, STATS_FILE,
};
use ripstop_fib::stats::{STATS_WORDS, Stats};
use ripstop_fib::{Publisher, Reader, Region, Word};

/// A run directory that goes away with the test.
struct RunDir(PathBuf);

impl RunDir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ripstop-fib-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// What the other processes do; without its environment variable it is an empty test.
#[test]
#[cfg_attr(miri, ignore = "needs files and processes")]
fn a_process_that_holds_a_lock() {
    let Some(run_dir) = std::env::var_os("RIPSTOP_TEST_LOCK") else {
        return;
    };
    let _lock = ProcessLock::acquire(Path::new(&run_dir), DATAPLANE_LOCK).unwrap();
    println!("\nlocked");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

fn process_with_lock(run_dir: &Path) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "map::a_process_that_holds_a_lock", "--nocapture"])
        .env("RIPSTOP_TEST_LOCK", run_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    assert!(output.lines().any(|line| line.unwrap() == "locked"));
    child
}

#[test]
#[cfg_attr(miri, ignore = "needs files and processes")]
fn a_lock_is_held_until_its_process_dies() {
    let run_dir = RunDir::new();
    assert_eq!(map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(), None);
    let mut child = process_with_lock(&run_dir.0);
    let pid = child.id();
    assert_eq!(
        map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(),
        Some(pid)
    );
    let error = ProcessLock::acquire(&run_dir.0, DATAPLANE_LOCK).unwrap_err();
    assert!(matches!(&error, MapError::Locked { pid: found, .. } if *found == pid));
    let expected =
        format!("dataplane.lock: in use by process {pid}; only one may run per run directory");
    assert!(error.to_string().contains(&expected), "{error}");
    // The attempt must not have taken the holder's lock or number away.
    assert_eq!(
        map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(),
        Some(pid)
    );
    // Another lock is another lock.
    ProcessLock::acquire(&run_dir.0, CONTROLPLANE_LOCK).unwrap();

    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(), None);
    let lock = ProcessLock::acquire(&run_dir.0, DATAPLANE_LOCK).unwrap();
    let own = std::process::id();
    assert_eq!(
        map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(),
        Some(own)
    );
    let text = fs::read_to_string(run_dir.file(DATAPLANE_LOCK)).unwrap();
    assert_eq!(text, format!("{own}\n"));
    drop(lock);
    assert_eq!(map::lock_owner(&run_dir.0, DATAPLANE_LOCK).unwrap(), None);
}

/// A reader that was started first waits on an empty region; what is published appears in its mapping.
#[test]
#[cfg_attr(miri, ignore = "needs shared memory")]
fn what_one_mapping_publishes_another_reads() {
    let run_dir = RunDir::new();
    let missing = map::open_fib(&run_dir.0).unwrap_err().to_string();
    assert!(missing.contains("fib: No such file"), "{missing}");

    let reading = map::open_or_create_fib(&run_dir.0).unwrap();
    let publishing = map::open_fib_for_publishing(&run_dir.0).unwrap();
    let region = Region::attach(reading.words()).unwrap();
    let pin = Word::new(0);
    let mut reader = Reader::new(region, &pin);
    reader.follow(region.current());
    assert_eq!(reader.pinned().generation(), 0);
    let mut publisher = Publisher::adopt(Region::attach(publishing.words()).unwrap());
    publisher
        .publish(&crate::example::image(), || vec![&pin])
        .unwrap();
    drop(publishing);
    assert!(reader.follow(region.current()));
    let image = ripstop_fib::Image::attach(reader.words()).unwrap();
    image.verify().unwrap();

    let again = map::open_fib_for_publishing(&run_dir.0).unwrap();
    let publisher = Publisher::adopt(Region::attach(again.words()).unwrap());
    assert_eq!(publisher.generation(), 1);
    let mode = fs::metadata(run_dir.file(FIB_FILE)).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
}

/// Whoever makes the fib region, all end up with the same file.
#[test]
#[cfg_attr(miri, ignore = "needs shared memory")]
fn creators_that_race_share_one_region() {
    for _ in 0..20 {
        let run_dir = RunDir::new();
        let mappings: Vec<_> = thread::scope(|scope| {
            let open = || map::open_fib_for_publishing(&run_dir.0).unwrap();
            let opening: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            opening
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let region = Region::attach(mappings[0].words()).unwrap();
        Publisher::adopt(region).publish(&[1], Vec::new).unwrap();
        for mapping in &mappings {
            let region = Region::attach(mapping.words()).unwrap();
            assert_eq!(region.snapshot().unwrap().0, 1);
        }
        let names: Vec<_> = fs::read_dir(&run_dir.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [FIB_FILE]);
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs shared memory")]
fn stats_are_made_anew_and_the_old_mapping_stays() {
    let run_dir = RunDir::new();
    // What a data plane left behind whose process id was the same.
    let first = map::create_stats(&run_dir.0, 1, 10).unwrap();
    let watching = map::open_stats(&run_dir.0).unwrap();
    let second = map::create_stats(&run_dir.0, 2, 20).unwrap();
    let old = Stats::attach(watching.words()).unwrap();
    Stats::attach(first.words()).unwrap().announce(3, 0);
    assert_eq!((old.pid(), old.workers().len()), (1, 3));
    assert_eq!(watching.words().len(), STATS_WORDS);

    let anew = map::open_stats(&run_dir.0).unwrap();
    Stats::attach(second.words()).unwrap().announce(5, 0);
    let anew = Stats::attach(anew.words()).unwrap();
    assert_eq!((anew.pid(), anew.workers().len()), (2, 5));
    assert_eq!((old.pid(), old.workers().len()), (1, 3));
}

#[test]
#[cfg_attr(miri, ignore = "needs shared memory")]
fn a_file_that_is_no_region_is_refused() {
    let run_dir = RunDir::new();
    map::create_stats(&run_dir.0, 1, 1).unwrap();
    let length = (STATS_WORDS * 8) as u64;
    type Damage = fn(&File);
    let cases: [(Damage, &str); 7] = [
        (
            |file| file.set_len(0).unwrap(),
            "header claims 0 words, the region has 0",
        ),
        (
            |file| file.set_len(7).unwrap(),
            "header claims 0 words, the region has 0",
        ),
        (
            |file| file.set_len((STATS_WORDS * 8) as u64 - 4).unwrap(),
            "header claims 17024 words, the region has 17023",
        ),
        (
            |file| file.set_len((STATS_WORDS * 8) as u64 + 8).unwrap(),
            "header claims 17024 words, the region has 17025",
        ),
        (
            |file| file.write_all_at(b"RIPSFIB1", 0).unwrap(),
            "wrong magic: starts with 0x3142494653504952, a region of this kind with 0x3141545353504952",
        ),
        (
            |file| file.write_all_at(&[9], 8).unwrap(),
            "layout version 9, this program uses version 2",
        ),
        (
            |file| file.write_all_at(&[0; 8], 16).unwrap(),
            "header claims 0 words, the region has 17024",
        ),
    ];
    for (damage, expected) in cases {
        map::create_stats(&run_dir.0, 1, 1).unwrap();
        let path = run_dir.file(STATS_FILE);
        let file = File::options().write(true).open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), length);
        damage(&file);
        let error = map::open_stats(&run_dir.0).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
        assert!(error.contains("remove the file, start again"), "{error}");
    }

    fs::write(run_dir.file(FIB_FILE), b"something else than a region").unwrap();
    for error in [
        map::open_fib(&run_dir.0).unwrap_err(),
        map::open_fib_for_publishing(&run_dir.0).unwrap_err(),
    ] {
        assert!(
            error.to_string().contains("wrong magic: starts with"),
            "{error}"
        );
    }
}
