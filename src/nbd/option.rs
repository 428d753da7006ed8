//! The handshake's option haggling as bytes. Pure.

use super::wire::{Violation, u16_at, u32_at, u64_at};

pub(super) const MAGIC_SERVER: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(super) const MAGIC_OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, the same bits in both directions.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 1 << 1;

pub(super) const REPLY_ACK: u32 = 1;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const REPLY_META_CONTEXT: u32 = 4;
pub(super) const REPLY_ERROR_BIT: u32 = 1 << 31;
pub(super) const ERROR_UNKNOWN_EXPORT: u32 = REPLY_ERROR_BIT | 6;
pub(super) const ERROR_SHUTTING_DOWN: u32 = REPLY_ERROR_BIT | 7;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// The longest string the protocol allows, bytes.
pub(super) const MAX_STRING: usize = 4096;
/// The longest option reply that is accepted, bytes: a string and a few numbers, generously.
const MAX_OPTION_REPLY: u32 = 64 << 10;

/// The options this client uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opt {
    Go,
    StructuredReply,
    SetMetaContext,
    ExtendedHeaders,
}

impl Opt {
    fn number(self) -> u32 {
        match self {
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::SetMetaContext => 10,
            Self::ExtendedHeaders => 11,
        }
    }

    /// The name in the specification.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Go => "NBD_OPT_GO",
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::SetMetaContext => "NBD_OPT_SET_META_CONTEXT",
            Self::ExtendedHeaders => "NBD_OPT_EXTENDED_HEADERS",
        }
    }
}

pub(super) fn encode_option(option: Opt, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend(MAGIC_OPTION.to_be_bytes());
    out.extend(option.number().to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
}

/// The data of `NBD_OPT_GO`, asking for the block sizes too.
pub(super) fn encode_go(export: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend(1u16.to_be_bytes());
    out.extend(INFO_BLOCK_SIZE.to_be_bytes());
    out
}

/// The data of `NBD_OPT_SET_META_CONTEXT`.
pub(super) fn encode_contexts(export: &str, contexts: &[String]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend((contexts.len() as u32).to_be_bytes());
    for context in contexts {
        put_string(&mut out, context);
    }
    out
}

/// The type of an option reply and the length of its data, which is bounded.
pub(super) fn decode_option_reply(option: Opt, header: &[u8; 20]) -> Result<(u32, usize), Violation> {
    let (magic, about, kind, len) = (u64_at(header, 0), u32_at(header, 8), u32_at(header, 12), u32_at(header, 16));
    if magic != MAGIC_OPTION_REPLY || about != option.number() {
        return Err(Violation(format!("an answer to {} begins with {magic:#018x} for option {about}", option.name())));
    }
    if len > MAX_OPTION_REPLY {
        return Err(Violation(format!("an answer to {} has {len} bytes", option.name())));
    }
    Ok((kind, len as usize))
}

/// A piece of the answer to `NBD_OPT_GO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Info {
    Export { size: u64, flags: u16 },
    BlockSize { minimum: u32, preferred: u32, maximum: u32 },
    Other,
}

pub(super) fn decode_info(data: &[u8]) -> Result<Info, Violation> {
    if data.len() < 2 {
        return Err(Violation(format!("an information of {} bytes", data.len())));
    }
    match (u16_at(data, 0), data.len()) {
        // Offsets are signed 64 bit numbers in every server and kernel.
        (INFO_EXPORT, 12) if i64::try_from(u64_at(data, 2)).is_ok() => {
            Ok(Info::Export { size: u64_at(data, 2), flags: u16_at(data, 10) })
        }
        (INFO_BLOCK_SIZE, 14) => {
            let (minimum, preferred, maximum) = (u32_at(data, 2), u32_at(data, 6), u32_at(data, 10));
            if minimum.is_power_of_two() && minimum <= 1 << 16 && preferred >= minimum && maximum >= minimum {
                Ok(Info::BlockSize { minimum, preferred, maximum })
            } else {
                Err(Violation(format!("block sizes of {minimum}, {preferred}, {maximum}")))
            }
        }
        (kind @ (INFO_EXPORT | INFO_BLOCK_SIZE), len) => {
            Err(Violation(format!("information {kind} of {len} bytes, or of an absurd size")))
        }
        _ => Ok(Info::Other),
    }
}

/// The number and the name of a selected meta context.
pub(super) fn decode_context(data: &[u8]) -> Result<(u32, &[u8]), Violation> {
    match data.split_at_checked(4) {
        Some((id, name)) => Ok((u32_at(id, 0), name)),
        None => Err(Violation(format!("a meta context of {} bytes", data.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn go_has_the_specified_bytes() {
        let go = encode_option(Opt::Go, &encode_go("ab"));
        assert_eq!(go, b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x02ab\0\x01\0\x03");
    }

    #[test]
    fn absurd_block_sizes_are_refused() {
        let info = |sizes: [u32; 3]| {
            let mut data = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
            data.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
            decode_info(&data)
        };
        assert!(info([1, 4096, 32 << 20]).is_ok());
        for sizes in [[0, 4096, 4096], [3, 4096, 4096], [1 << 17, 1 << 17, 1 << 17], [512, 1, 4096], [512, 512, 0]] {
            info(sizes).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn hostile_option_replies_do_no_harm(header: [u8; 20], data in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = decode_option_reply(Opt::Go, &header);
            let _ = decode_info(&data);
            let _ = decode_context(&data);
        }
    }
}
