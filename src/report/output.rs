//! Where lines go, and what may be in them.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, ErrorKind, Write},
};

/// A stream of lines: stdout, stderr, a log.
///
/// Trouble with it never reaches the run: a backup does not fail because somebody closed a terminal. A reader that went
/// away (`… | head`) is a normal end; nothing more is written then.
pub struct Output {
    writer: Option<Box<dyn Write + Send>>,
}

impl Output {
    /// Lines for `writer`.
    pub fn new(writer: impl Write + Send + 'static) -> Self {
        Self { writer: Some(Box::new(writer)) }
    }

    /// Lines for nobody.
    pub fn none() -> Self {
        Self { writer: None }
    }

    /// Writes a line in one piece, so that lines of several processes do not mix.
    pub fn line(&mut self, line: &str) {
        let Some(writer) = &mut self.writer else { return };
        let mut text = String::with_capacity(line.len() + 1);
        text.push_str(line);
        text.push('\n');
        let written = writer.write_all(text.as_bytes()).and_then(|()| writer.flush());
        if written.is_err_and(|e| e.kind() == ErrorKind::BrokenPipe) {
            self.writer = None;
        }
    }
}

/// Writes a command's result. A reader that went away is a normal end.
///
/// # Errors
/// When writing fails otherwise; a result that is cut short must not look like success.
pub fn write_result(writer: &mut dyn Write, text: &str) -> io::Result<()> {
    match writer.write_all(text.as_bytes()).and_then(|()| writer.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The text without anything that a terminal or a log could take for more than text: names and messages come from
/// guests, archives and QEMU.
pub fn printable(text: &str) -> Cow<'_, str> {
    // Besides control characters, those that reorder what is shown.
    let harmful = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(harmful) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if harmful(c) {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// The lines of a message, each printable.
pub fn printable_lines(text: &str) -> impl Iterator<Item = Cow<'_, str>> {
    text.lines().map(|line| printable(line.trim_end()))
}

#[cfg(test)]
pub(crate) mod capture {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex, PoisonError},
    };

    /// A writer whose content can be read while it is in use.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Capture(Arc<Mutex<Vec<u8>>>);

    impl Capture {
        pub(crate) fn text(&self) -> String {
            String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
        }

        pub(crate) fn lines(&self) -> Vec<String> {
            self.text().lines().map(str::to_owned).collect()
        }
    }

    impl Write for Capture {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_reader_that_went_away_ends_the_output_quietly() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        drop(theirs);
        let mut output = Output::new(ours.try_clone().expect("clone"));
        output.line("one");
        assert!(output.writer.is_none());
        output.line("two");
        let mut ours = ours;
        write_result(&mut ours, "result").expect("a broken pipe is a normal end");
    }

    #[test]
    fn a_full_disk_is_no_normal_end_of_a_result() {
        let mut full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        assert!(write_result(&mut full, "result").is_err());
        let mut output = Output::new(full);
        output.line("one");
        assert!(output.writer.is_some());
    }

    #[test]
    fn what_a_guest_sends_cannot_steer_the_terminal() {
        assert_eq!(printable("web01"), "web01");
        assert_eq!(printable("\u{1b}[2J\rx"), "\\u{1b}[2J\\rx");
        assert_eq!(printable("a\u{202e}b"), "a\\u{202e}b");
        assert_eq!(printable_lines("a\nb\tc").collect::<Vec<_>>(), ["a", "b\\tc"]);
    }
}
