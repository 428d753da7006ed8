//! The handshake over a stream: headers, structured replies, meta contexts, export.

use super::{
    error::NbdError,
    option::{
        ERROR_SHUTTING_DOWN, ERROR_UNKNOWN_EXPORT, FIXED_NEWSTYLE, Info, MAGIC_OPTION, MAGIC_SERVER, MAX_STRING,
        NO_ZEROES, Opt, REPLY_ACK, REPLY_ERROR_BIT, REPLY_INFO, REPLY_META_CONTEXT, decode_context, decode_info,
        decode_option_reply, encode_contexts, encode_go, encode_option,
    },
    wire::{Framing, MAX_READ, shown, u16_at, u64_at},
};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Replies to one option that are accepted before its end: more than any server sends, few enough to end soon.
const MAX_REPLIES: usize = 256;

const FLAG_READ_ONLY: u16 = 1 << 1;
const FLAG_TRIM: u16 = 1 << 5;
const FLAG_MULTI_CONN: u16 = 1 << 8;
const FLAG_STATUS_PAYLOAD: u16 = 1 << 12;

/// What the server said about the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes.
    pub size: u64,
    /// The raw transmission flags.
    pub flags: u16,
    /// The smallest unit of a request, bytes; a power of two, at most 65,536.
    pub min_block: u32,
    /// The unit at which the server works best, bytes.
    pub preferred_block: u32,
    /// The longest read the server takes as one request, bytes. Longer ones are split by the client.
    pub max_block: u32,
    /// The form of the headers.
    pub framing: Framing,
    /// The selected meta contexts with their numbers on this connection.
    pub contexts: Vec<(u32, String)>,
}

impl ExportInfo {
    /// Whether `len` bytes at `offset` lie inside the export, and at borders of its blocks.
    pub(super) fn has(&self, offset: u64, len: u64) -> bool {
        let block = u64::from(self.min_block);
        offset.checked_add(len).is_some_and(|end| end <= self.size)
            && offset.is_multiple_of(block)
            && len.is_multiple_of(block)
    }

    /// Whether the export refuses writes, trims among them.
    pub fn is_read_only(&self) -> bool {
        self.flags & FLAG_READ_ONLY != 0
    }

    /// Whether TRIM is offered.
    pub fn can_trim(&self) -> bool {
        self.flags & FLAG_TRIM != 0
    }

    /// Whether several connections to the export see the same data.
    pub fn can_multi_conn(&self) -> bool {
        self.flags & FLAG_MULTI_CONN != 0
    }

    /// Whether a block status can be asked of a single context out of several. Only then does the failure of one context
    /// leave the others alone.
    pub fn can_select_context(&self) -> bool {
        self.framing == Framing::Extended && self.flags & FLAG_STATUS_PAYLOAD != 0
    }
}

/// How the server answered an option.
enum Answer {
    Acknowledged,
    Refused { code: u32, text: String },
}

fn read_failed(error: io::Error) -> NbdError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => NbdError::Closed { cause: None },
        _ => NbdError::io("read from", error),
    }
}

/// Negotiates. The caller limits the time.
pub(super) async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
    contexts: &[String],
) -> Result<ExportInfo, NbdError> {
    if let Some(name) = contexts.iter().map(String::as_str).chain([export]).find(|name| name.len() > MAX_STRING) {
        return Err(NbdError::NotOffered {
            what: "names of more than 4096 bytes",
            text: name.chars().take(80).collect(),
        });
    }
    greet(stream).await?;

    let extended = match option(stream, Opt::ExtendedHeaders, &[], nothing).await? {
        Answer::Acknowledged => Framing::Extended,
        Answer::Refused { .. } => match option(stream, Opt::StructuredReply, &[], nothing).await? {
            Answer::Acknowledged => Framing::Compact,
            Answer::Refused { text, .. } => return Err(NbdError::NotOffered { what: "structured replies", text }),
        },
    };
    let selected = select_contexts(stream, export, contexts).await?;
    go(stream, export, extended, selected).await
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), NbdError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await.map_err(read_failed)?;
    let (server, options, flags) = (u64_at(&greeting, 0), u64_at(&greeting, 8), u16_at(&greeting, 16));
    if server != MAGIC_SERVER {
        return Err(NbdError::Protocol(format!("the greeting begins with {server:#018x}: not an nbd server")));
    }
    if options != MAGIC_OPTION || flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::NotOffered { what: "the fixed newstyle handshake", text: String::new() });
    }
    let answer = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
    send(stream, &answer.to_be_bytes()).await
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> Result<(), NbdError> {
    stream.write_all(bytes).await.map_err(|error| NbdError::io("write to", error))?;
    stream.flush().await.map_err(|error| NbdError::io("write to", error))
}

fn nothing(kind: u32, _: &[u8]) -> Result<(), NbdError> {
    Err(NbdError::Protocol(format!("an option without data is answered with type {kind}")))
}

/// Sends an option and hands every reply before the last to `each`.
async fn option<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    option: Opt,
    data: &[u8],
    mut each: impl FnMut(u32, &[u8]) -> Result<(), NbdError>,
) -> Result<Answer, NbdError> {
    send(stream, &encode_option(option, data)).await?;
    for _ in 0..MAX_REPLIES {
        let mut header = [0; 20];
        stream.read_exact(&mut header).await.map_err(read_failed)?;
        let (kind, len) = decode_option_reply(option, &header)?;
        let mut data = vec![0; len];
        stream.read_exact(&mut data).await.map_err(read_failed)?;
        match kind {
            REPLY_ACK if data.is_empty() => return Ok(Answer::Acknowledged),
            ERROR_SHUTTING_DOWN => return Err(NbdError::ShuttingDown { text: shown(&data) }),
            code if code & REPLY_ERROR_BIT != 0 => return Ok(Answer::Refused { code, text: shown(&data) }),
            kind => each(kind, &data)?,
        }
    }
    Err(NbdError::Protocol(format!("more than {MAX_REPLIES} answers to {}", option.name())))
}

fn refused(option: Opt, export: &str, code: u32, text: String) -> NbdError {
    match code {
        ERROR_UNKNOWN_EXPORT => NbdError::NoExport { export: export.to_owned(), text },
        _ => NbdError::OptionRefused { option: option.name(), code, text },
    }
}

async fn select_contexts<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
    contexts: &[String],
) -> Result<Vec<(u32, String)>, NbdError> {
    if contexts.is_empty() {
        return Ok(Vec::new());
    }
    let mut selected: Vec<(u32, String)> = Vec::new();
    let query = encode_contexts(export, contexts);
    let answer = option(stream, Opt::SetMetaContext, &query, |kind, data| {
        if kind != REPLY_META_CONTEXT {
            return Err(NbdError::Protocol(format!("the choice of meta contexts is answered with type {kind}")));
        }
        let (id, name) = decode_context(data)?;
        let Some(name) = contexts.iter().find(|asked| asked.as_bytes() == name) else {
            return Err(NbdError::Protocol(format!("meta context `{}` was not asked for", shown(name))));
        };
        if selected.iter().any(|known| known.0 == id || known.1 == *name) {
            return Err(NbdError::Protocol(format!("meta context `{name}`, number {id}, is selected twice")));
        }
        selected.push((id, name.clone()));
        Ok(())
    });
    if let Answer::Refused { code, text } = answer.await? {
        return Err(refused(Opt::SetMetaContext, export, code, text));
    }
    // A query the server does not know is left out without a word.
    match contexts.iter().find(|asked| !selected.iter().any(|(_, name)| name == *asked)) {
        Some(missing) => Err(NbdError::ContextMissing(missing.clone())),
        None => Ok(selected),
    }
}

async fn go<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    export: &str,
    framing: Framing,
    contexts: Vec<(u32, String)>,
) -> Result<ExportInfo, NbdError> {
    let mut found = None;
    // What the specification lets a client assume when the server does not say.
    let mut blocks = (1, 4096, MAX_READ);
    let query = encode_go(export);
    let answer = option(stream, Opt::Go, &query, |kind, data| {
        if kind != REPLY_INFO {
            return Err(NbdError::Protocol(format!("the choice of the export is answered with type {kind}")));
        }
        match decode_info(data)? {
            Info::Export { size, flags } => found = Some((size, flags)),
            Info::BlockSize { minimum, preferred, maximum } => blocks = (minimum, preferred, maximum),
            Info::Other => {}
        }
        Ok(())
    });
    if let Answer::Refused { code, text } = answer.await? {
        return Err(refused(Opt::Go, export, code, text));
    }
    let Some((size, flags)) = found else {
        return Err(NbdError::Protocol("the export's size is not told".into()));
    };
    let (min_block, preferred_block, maximum) = blocks;
    let max_block = maximum.min(MAX_READ) & !(min_block - 1);
    Ok(ExportInfo { size, flags, min_block, preferred_block, max_block, framing, contexts })
}
