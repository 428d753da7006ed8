//! From the snapshot access into the provider: every disk's map, the streams, the manifest.

use super::{
    Baseline, Cancelled, Options, ProviderThread,
    plan::{baseline_len, least_granularity},
};
use crate::{
    access::{ActiveAccess, BitmapAction, DiskAccess, SnapshotAccess, fleecing::Witness},
    archive::{ArchiveId, ArchiveName, DiskEntry, FineEntry, Manifest, SkippedDisk},
    copy::{self, Budget, CopyError, Counters, DiskMap, DiskReader, RateLimit, Settings, Source},
    guest::{Disk, Guest, GuestKind},
    nbd::{Client, ConnectOptions},
    provider::{BackupInput, DiskInput, Expected, FineInput, MakeManifest, Mechanism, Stored},
    report::{Event, Events, Summary},
    segment::{
        Content, DiskTables, SegmentLen, SegmentTable,
        layers::{Division, divide, untouched},
        tasks,
    },
};
use anyhow::{Context, Result, anyhow, bail};
use jiff::Timestamp;
use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Bytes of disk content in memory at most, besides what the provider needs.
pub const MEMORY: u64 = 32 << 20;
/// Largest read: more gained nothing on a unix socket.
const REQUEST: u64 = 1 << 20;
/// Reads in flight per disk.
const IN_FLIGHT: usize = 8;
/// Connections per export.
const CONNECTIONS: usize = 2;

/// What does not change while a guest is copied.
pub(super) struct Transfer<'a> {
    pub guest: &'a Guest,
    pub options: &'a Options,
    pub events: &'a Events,
    pub cancel: &'a CancellationToken,
    pub name: &'a ArchiveName,
    pub generation: &'a str,
    pub disks: &'a [Disk],
    pub skipped: &'a [(String, String)],
    pub active: &'a ActiveAccess,
    pub mechanism: Mechanism,
}

/// An archive that is durable.
pub(super) struct Copied {
    pub stored: Stored,
    /// The segment length of every disk, in their order.
    pub segment_lens: Vec<SegmentLen>,
}

/// What all disks of a guest are read with.
struct Reading {
    settings: Settings,
    stop: CancellationToken,
    failed: Arc<Mutex<Option<CopyError>>>,
    discards: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>>,
}

/// One disk on its way.
struct DiskRun {
    map: DiskMap,
    base: Option<(ArchiveId, DiskTables)>,
    segment_len: SegmentLen,
    reason: String,
    clients: Vec<Client>,
    counters: Arc<Counters>,
}

impl Transfer<'_> {
    /// Copies all disks; returns when the archive is durable.
    pub(super) async fn run(
        &self,
        baselines: Vec<Baseline>,
        provider: &mut ProviderThread,
        access: &mut dyn SnapshotAccess,
        summary: &mut Summary,
    ) -> Result<Copied> {
        let (active, disks) = (self.active, self.disks);
        summary.paused_micros = active.consistency.paused_micros;
        summary.frozen_millis = active.consistency.frozen_millis;
        summary.disks = disks.len();
        summary.size_bytes = active.disks.iter().map(|d| d.size).sum();

        let mut runs = Vec::new();
        for ((disk, baseline), access) in disks.iter().zip(baselines).zip(&active.disks) {
            let run = self.prepare_disk(disk, baseline, access).await?;
            self.events.send(Event::DiskPlan {
                disk: disk.name.clone(),
                size: access.size,
                todo: run.map.dirty_bytes,
                action: access.action.as_str(),
                reason: run.reason.clone(),
            });
            runs.push(run);
        }
        summary.incremental = runs.iter().all(|r| r.base.is_some());
        let stored = self.copy(&runs, provider, access, summary).await;
        summary.read_bytes = runs.iter().map(|r| r.counters.read.load(Ordering::Relaxed)).sum();
        summary.discarded_bytes = runs.iter().map(|r| r.counters.discarded.load(Ordering::Relaxed)).sum();
        for client in runs.iter().flat_map(|r| &r.clients) {
            // Every reply has to be read before the export goes: QEMU spins on a client that does not listen.
            if let Err(error) = client.disconnect().await {
                tracing::debug!("disconnecting: {error}");
            }
        }
        Ok(Copied { stored: stored?, segment_lens: runs.iter().map(|run| run.segment_len).collect() })
    }

    /// Connects, and finds out what has to be read.
    async fn prepare_disk(&self, disk: &Disk, baseline: Baseline, access: &DiskAccess) -> Result<DiskRun> {
        let connect = async |contexts: Vec<String>| -> Result<Client> {
            let options = ConnectOptions {
                socket: self.active.socket.clone(),
                export: access.export.clone(),
                contexts,
                deadline: self.options.nbd_timeout,
                longest_read: access.largest_request.unwrap_or(ConnectOptions::LONGEST_READ),
            };
            Client::connect(&options)
                .await
                .map_err(|source| anyhow!(CopyError::Nbd { disk: disk.name.clone(), source }))
        };
        let dirty = match &access.dirty_context {
            Some(context) => Some(connect(vec![context.clone()]).await?),
            None => None,
        };
        let allocation = connect(vec!["base:allocation".into()]).await?;
        let map = copy::read_map(access, dirty.as_ref(), Some(&allocation)).await?;
        let segment_len = baseline_len(&baseline, disk, self.options);
        let (base, reason) = match (baseline, access.action) {
            (Baseline::Archive { archive, tables, .. }, BitmapAction::Used) => {
                (Some((archive, tables)), access.reason.clone())
            }
            (Baseline::Archive { .. }, _) => (None, access.reason.clone()),
            (Baseline::Full { reason }, _) => (None, reason),
        };
        if base.is_none() && map.dirty_bytes != access.size {
            bail!("disk `{}`: QEMU shows {} of {} bytes, but all are needed", disk.name, map.dirty_bytes, access.size);
        }
        let least = least_granularity(self.mechanism, segment_len);
        if !access.clean_readable && access.granularity < least.bytes() {
            bail!(
                "disk `{}`: the dirty bitmap's granularity of {} bytes is below the {} that are stored together, and clean ranges \
                 cannot be read; a full backup (`--full`) starts a new bitmap",
                disk.name,
                access.granularity,
                least.bytes()
            );
        }
        let mut clients = vec![allocation];
        if clients[0].can_multi_conn() {
            for _ in 1..CONNECTIONS {
                clients.push(connect(Vec::new()).await?);
            }
        }
        if let Some(client) = dirty {
            client.disconnect().await.ok();
        }
        Ok(DiskRun { map, base, segment_len, reason, clients, counters: Arc::default() })
    }

    /// Streams everything into the provider; returns when the archive is durable.
    async fn copy(
        &self,
        runs: &[DiskRun],
        provider: &mut ProviderThread,
        access: &mut dyn SnapshotAccess,
        summary: &mut Summary,
    ) -> Result<Stored> {
        let (active, disks) = (self.active, self.disks);
        // Changed segments are told from unchanged ones by their time, so it must be later than any in a base archive, also
        // when the host's clock was set back since.
        let tables = runs.iter().filter_map(|r| r.base.as_ref()).flat_map(|(_, t)| [&t.segments, &t.fine]);
        let newest = tables.flat_map(SegmentTable::records).map(|r| r.stored_at).max();
        let stored_at = active.instant.as_microsecond().max(newest.map_or(i64::MIN, |n| n.saturating_add(1)));
        let instant = Timestamp::from_microsecond(stored_at).context("the clock shows an impossible time")?;

        let stop = self.cancel.child_token();
        let failed: Arc<Mutex<Option<CopyError>>> = Arc::default();
        let discards: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>> = Arc::default();
        let settings = Settings {
            request: REQUEST,
            in_flight: IN_FLIGHT,
            limit: self.options.rate.map(|r| Arc::new(RateLimit::new(r))),
            budget: Budget::new(MEMORY),
            grain: 64 << 10,
        };
        let mut order: Vec<usize> = (0..disks.len()).collect();
        order.sort_by(|a, b| disks[*a].name.cmp(&disks[*b].name));
        let fleecing = access.fleecing_witnesses();
        let mut inputs = Vec::new();
        let reading = Reading { settings, stop: stop.clone(), failed: failed.clone(), discards: discards.clone() };
        for index in &order {
            let fleecing = fleecing.get(*index).and_then(Option::as_ref);
            inputs.push(self.disk_input(&disks[*index], &runs[*index], &active.disks[*index], fleecing, &reading)?);
        }
        let mut members = vec![("guest.conf".to_owned(), self.guest.config.clone())];
        members.extend(self.guest.firewall.clone().map(|text| ("firewall.conf".to_owned(), text)));
        let input = BackupInput {
            archive: self.name.clone(),
            instant,
            members,
            disks: inputs,
            manifest: self.manifest(runs, &order),
            cancel: stop.clone(),
        };
        let job = provider.run(move |p| p.backup(input));
        tokio::pin!(job);
        let result = loop {
            tokio::select! {
                result = &mut job => break result,
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    summary.fleecing_peak_bytes = summary.fleecing_peak_bytes.max(access.fleecing_bytes());
                }
            }
        };
        summary.fleecing_peak_bytes = summary.fleecing_peak_bytes.max(access.fleecing_bytes());
        stop.cancel();
        let discards = std::mem::take(&mut *discards.lock().unwrap_or_else(PoisonError::into_inner));
        for task in discards {
            task.await.ok();
        }
        let cause = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (result, cause) {
            (Ok(stored), None) => Ok(stored),
            (_, Some(cause)) => Err(anyhow!(cause)),
            (Err(_), None) if self.cancel.is_cancelled() => Err(anyhow!(Cancelled)),
            (Err(error), None) => Err(error),
        }
    }

    /// What the provider gets of one disk.
    fn disk_input(
        &self,
        disk: &Disk,
        run: &DiskRun,
        access: &DiskAccess,
        fleecing: Option<&Witness>,
        reading: &Reading,
    ) -> Result<DiskInput> {
        let (base, len) = (run.base.as_ref(), run.segment_len);
        let division = match base {
            Some((_, tables)) if self.mechanism == Mechanism::Layers => {
                let division = divide(&run.map.content, len, &tables.fine, access.clean_readable);
                Some(division.map_err(|source| CopyError::Map { disk: disk.name.clone(), source })?)
            }
            _ => None,
        };
        let (segments, fine) = match division {
            Some(Division { segments, fine, kept }) => (segments, Some((fine, kept))),
            None => (run.map.content.clone(), None),
        };
        let segment_tasks = || tasks(&segments, len);
        let fine_tasks = || fine.iter().flat_map(|(content, _)| tasks(content, SegmentLen::FINE));
        let expected = segment_tasks().filter(|task| !task.zero || base.is_some());
        let expected = expected.map(|task| Expected { index: task.index, zero: task.zero }).collect();
        let expected_fine: Vec<u64> = fine_tasks().map(|task| task.index).collect();
        let untouched = if access.clean_readable && base.is_some() {
            untouched(access.size, segment_tasks().chain(fine_tasks()))
        } else {
            Vec::new()
        };
        let read = |segment_len, content, untouched, last| {
            let source = Source {
                disk: disk.name.clone(),
                segment_len,
                content,
                tell_zeroes: base.is_some(),
                untouched,
                todo: run.map.content.bytes_where(|content| content != Content::Clean),
                last,
                clients: run.clients.clone(),
                fleecing: fleecing.cloned(),
                counters: run.counters.clone(),
            };
            let Reading { settings, stop, failed, discards } = reading;
            let settings = Settings { grain: access.granularity.max(64 << 10), ..settings.clone() };
            DiskReader::new(source, settings, self.events.clone(), stop.clone(), failed.clone(), discards.clone())
        };
        // Behind a layer that has nothing to be read nobody asks for its end.
        let changed = Box::new(read(len, segments, untouched, expected_fine.is_empty()));
        let fine = fine.map(|(content, kept)| FineInput {
            base: kept,
            changed: if expected_fine.is_empty() {
                Box::new(std::iter::empty())
            } else {
                Box::new(read(SegmentLen::FINE, content, Vec::new(), true))
            },
            expected: expected_fine,
        });
        Ok(DiskInput {
            name: disk.name.clone(),
            size: access.size,
            segment_len: len,
            base: base.map(|(archive, tables)| (archive.clone(), tables.segments.clone())),
            expected,
            changed,
            fine,
        })
    }

    fn manifest(&self, runs: &[DiskRun], order: &[usize]) -> MakeManifest {
        let (active, disks) = (self.active, self.disks);
        let template = Manifest {
            version: Manifest::VERSION,
            program: env!("CARGO_PKG_VERSION").into(),
            archive: self.name.clone(),
            guest_kind: match self.guest.kind {
                GuestKind::Proxmox => "proxmox".into(),
                GuestKind::Plain => "plain".into(),
            },
            guest_name: self.guest.name.clone(),
            instant: active.instant,
            consistency: active.consistency.clone(),
            disks: Vec::new(),
            skipped: self
                .skipped
                .iter()
                .map(|(name, reason)| SkippedDisk { name: name.clone(), reason: reason.clone() })
                .collect(),
            firewall: self.guest.firewall.is_some(),
        };
        let facts: Vec<(DiskEntry, SegmentLen, Arc<Counters>)> = order
            .iter()
            .map(|index| {
                let (disk, run, access) = (&disks[*index], &runs[*index], &active.disks[*index]);
                let entry = DiskEntry {
                    name: disk.name.clone(),
                    device: disk.device.clone(),
                    size: access.size,
                    segment_len: run.segment_len.bytes(),
                    data_bytes: 0,
                    digest: String::new(),
                    fine: None,
                    bitmap_action: access.action.as_str().into(),
                    reason: run.reason.clone(),
                    generation: Some(self.generation.to_owned()),
                    read_bytes: 0,
                };
                (entry, run.segment_len, run.counters.clone())
            })
            .collect();
        Box::new(move |tables| {
            let entries = facts.into_iter().zip(tables).map(|((entry, len, counters), tables)| DiskEntry {
                data_bytes: tables.data_bytes(len, entry.size),
                digest: tables.segments.digest_hex(),
                fine: FineEntry::of(&tables.fine),
                read_bytes: counters.read.load(Ordering::Relaxed),
                ..entry
            });
            template.with_disks(entries.collect())
        })
    }
}
