//! A guest that is busy: reproducible random operations in the background.

use super::{disk::Format, writer::GuestWriter};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// splitmix64: enough randomness for offsets, and the same on every machine.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// What the guest does in the background.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    pub seed: u64,
    /// Disks written to; all of the machine's if empty.
    pub disks: Vec<String>,
    /// Longest request in bytes.
    pub longest: u64,
    /// Between two operations.
    pub pause: Duration,
    /// After so many operations it ends by itself.
    pub operations: usize,
}

impl LoadPlan {
    pub fn seeded(seed: u64) -> Self {
        Self { seed, disks: Vec::new(), longest: 256 * 1024, pause: Duration::from_millis(1), operations: usize::MAX }
    }

    pub fn on(mut self, disks: &[&str]) -> Self {
        self.disks = disks.iter().map(|disk| (*disk).to_owned()).collect();
        self
    }

    pub fn pause(mut self, pause: Duration) -> Self {
        self.pause = pause;
        self
    }

    pub fn operations(mut self, operations: usize) -> Self {
        self.operations = operations;
        self
    }
}

/// How a load ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadReport {
    pub operations: usize,
    /// The error that the guest saw, or that the machine is gone.
    pub failed: Option<String>,
}

/// A load under way; ends when dropped.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    thread: Option<JoinHandle<LoadReport>>,
}

impl Load {
    pub fn start(writer: Arc<GuestWriter>, plan: LoadPlan) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stop_seen, count) = (Arc::clone(&stop), Arc::clone(&done));
        let thread = std::thread::Builder::new()
            .name("rig-load".into())
            .spawn(move || {
                let mut random = Random::new(plan.seed);
                let mut failed = None;
                while failed.is_none()
                    && count.load(Ordering::SeqCst) < plan.operations
                    && !stop_seen.load(Ordering::SeqCst)
                {
                    failed = one_operation(&writer, &plan, &mut random).err();
                    if failed.is_none() {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    std::thread::sleep(plan.pause);
                }
                LoadReport { operations: count.load(Ordering::SeqCst), failed }
            })
            .expect("a thread starts");
        Self { stop, done, thread: Some(thread) }
    }

    /// Operations completed so far.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::SeqCst)
    }

    /// Waits until `count` operations are done.
    pub fn wait_for(&self, count: usize) {
        let deadline = std::time::Instant::now() + Duration::from_mins(1);
        while self.done() < count && !self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            assert!(std::time::Instant::now() < deadline, "the load did {} of {count} operations in 60 s", self.done());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the load; an error that the guest saw fails the test.
    pub fn stop(self) -> usize {
        let report = self.end();
        assert_eq!(report.failed, None, "the guest saw an error after {} operations", report.operations);
        report.operations
    }

    /// Ends the load and tells how it went.
    pub fn end(mut self) -> LoadReport {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().expect("a load ends once").join().expect("the load does not panic")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn one_operation(writer: &GuestWriter, plan: &LoadPlan, random: &mut Random) -> Result<(), String> {
    const SECTOR: u64 = 512;
    let disk = &plan.disks[random.below(plan.disks.len() as u64) as usize];
    let sectors = writer.size(disk) / SECTOR;
    let length = 1 + random.below((plan.longest / SECTOR).min(sectors));
    let offset = random.below(sectors - length + 1) * SECTOR;
    let length = length * SECTOR;
    match random.below(10) {
        0 => writer.write_zeroes(disk, offset, length),
        1 | 2 if writer.format(disk) == Format::Raw => writer.discard(disk, offset, length),
        _ => writer.write(disk, offset, length, 1 + random.below(255) as u8),
    }
}
