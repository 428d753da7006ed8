//! `pvebackup access map`: what a disk of an access by hand holds.

use super::{
    disk_of,
    grid::{self, Characters, Colours, Style},
};
use crate::{
    by_hand,
    cli::{Context, exit, print},
    copy::DiskMap,
    guest::GuestId,
    report::{SCHEMA, printable, sizes},
    segment::Content,
};
use anyhow::Result;
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    io::{IsTerminal, stdout},
};

/// Extents in the table, if not all are asked for.
const FEW: usize = 40;
/// Lines of the picture.
const LINES: usize = 16;

#[derive(clap::Args, Debug)]
pub(in crate::cli) struct MapArgs {
    /// Guest
    #[arg(value_name = "GUEST")]
    guest: GuestId,
    /// Disk, as `access status` names it
    #[arg(value_name = "DISK")]
    disk: String,
    /// List all extents, however many there are
    #[arg(long)]
    all: bool,
    /// Draw the picture with ASCII characters
    #[arg(long)]
    ascii: bool,
}

pub(super) async fn run(args: MapArgs, context: Context) -> Result<u8> {
    let kept = by_hand::find(&context.dirs, &args.guest)?;
    let disk = disk_of(&kept, &args.disk)?;
    let map = by_hand::map(&kept, disk).await?;
    let tracked = disk.dirty_context.is_some();
    if context.json {
        print(&line(&args.guest, &args.disk, &map, tracked)?);
        return Ok(exit::OK);
    }
    let terminal = stdout().is_terminal();
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let style = Style {
        width: width(),
        lines: LINES,
        characters: if args.ascii { Characters::Ascii } else { Characters::Unicode },
        colours: if colours { Colours::Ansi } else { Colours::None },
    };
    print(&text(&args.disk, &map, tracked, if args.all { usize::MAX } else { FEW }, style));
    Ok(exit::OK)
}

/// Columns of the terminal on standard output, or of what stands in for it.
fn width() -> usize {
    let asked = || std::env::var("COLUMNS").ok()?.parse().ok();
    terminal_size::terminal_size().map(|(width, _)| width.0.into()).or_else(asked).unwrap_or(80)
}

/// What an extent is: `data` and `zero` are dirty where there is a dirty bitmap.
fn word(content: Content) -> &'static str {
    match content {
        Content::Data => "data",
        Content::Zero => "zero",
        Content::Clean => "clean",
    }
}

fn line(guest: &GuestId, disk: &str, map: &DiskMap, tracked: bool) -> serde_json::Result<String> {
    let total = |content| map.content.bytes_where(|c| c == content);
    let extents: Vec<Value> = (&map.content)
        .into_iter()
        .map(|extent| json!({"offset": extent.offset, "length": extent.len, "state": word(extent.state)}))
        .collect();
    serde_json::to_string(&json!({
        "schema": SCHEMA, "type": "access-map", "guest": guest, "disk": disk, "size": map.content.size(),
        "dirty_bytes": tracked.then_some(map.dirty_bytes), "data_bytes": total(Content::Data),
        "zero_bytes": total(Content::Zero), "clean_bytes": total(Content::Clean), "extents": extents,
    }))
}

fn text(disk: &str, map: &DiskMap, tracked: bool, most: usize, style: Style) -> String {
    let mut text = format!("{:>20}  {:>20}  {:<5}\n", "OFFSET", "LENGTH", "STATE");
    for extent in map.content.iter().take(most) {
        let _ = writeln!(
            text,
            "{:>20}  {:>20}  {:<5}  {}",
            extent.offset,
            extent.len,
            word(extent.state),
            sizes::short_bytes(extent.len)
        );
    }
    if let Some(more) = map.content.len().checked_sub(most).filter(|more| *more > 0) {
        let _ = writeln!(text, "{:>20}  and {more} more extents (`--all` lists them)", "");
    }
    let total = |content| sizes::short_bytes(map.content.bytes_where(|c| c == content));
    let _ = write!(text, "\n{}: {}, ", printable(disk), sizes::short_bytes(map.content.size()));
    if tracked {
        let _ = write!(text, "{} dirty: ", sizes::short_bytes(map.dirty_bytes));
    }
    let _ = write!(text, "{} data, {} zeroes", total(Content::Data), total(Content::Zero));
    if tracked {
        let _ = write!(text, "; {} clean", total(Content::Clean));
    }
    text.push_str("\n\n");
    text.push_str(&grid::render(&map.content, style));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::{Extent, Extents};

    fn map() -> DiskMap {
        let extent = |offset, len, state| Extent { offset, len, state };
        let list = [
            extent(0, 65536, Content::Data),
            extent(65536, 131_072, Content::Clean),
            extent(196_608, 65536, Content::Zero),
        ];
        DiskMap { content: Extents::from_ordered(262_144, list).unwrap(), dirty_bytes: 131_072, data_bytes: 65536 }
    }

    #[test]
    fn json_has_extents_and_totals() {
        let guest = "100".parse().unwrap();
        let value: Value = serde_json::from_str(&line(&guest, "scsi0", &map(), true).unwrap()).unwrap();
        assert_eq!(
            (&value["dirty_bytes"], &value["data_bytes"], &value["zero_bytes"], &value["clean_bytes"]),
            (&json!(131_072), &json!(65536), &json!(65536), &json!(131_072))
        );
        assert_eq!(value["extents"][1], json!({"offset": 65536, "length": 131_072, "state": "clean"}));
        let value: Value = serde_json::from_str(&line(&guest, "scsi0", &map(), false).unwrap()).unwrap();
        assert_eq!(value["dirty_bytes"], Value::Null);
    }

    #[test]
    fn a_long_table_is_cut_and_says_so() {
        let style = Style { width: 80, lines: 16, characters: Characters::Ascii, colours: Colours::None };
        let whole = text("scsi0", &map(), true, FEW, style);
        assert!(whole.contains("scsi0: 256 KiB, 128 KiB dirty: 64 KiB data, 64 KiB zeroes; 128 KiB clean"), "{whole}");
        assert!(!whole.contains("more extents"));
        assert!(text("scsi0", &map(), true, 1, style).contains("and 2 more extents"));
    }
}
