//! The encryption of a repository's small files.

use aes256ctr_poly1305aes::{Aes256CtrPoly1305Aes, Key, Nonce, aead::AeadInPlace};
use std::{
    fs::File,
    io::{self, Read},
};

/// An AES key of 32 bytes, then the two halves of a Poly1305-AES key (restic's design document, "Keys, Encryption and MAC").
pub(super) type SealKey = [u8; 64];

/// The cipher of a key.
pub(super) fn cipher(key: &SealKey) -> Aes256CtrPoly1305Aes {
    Aes256CtrPoly1305Aes::new(Key::from_slice(key))
}

/// Encrypts: a random nonce, the content, the MAC.
pub(super) fn seal(key: &SealKey, mut body: Vec<u8>) -> io::Result<Vec<u8>> {
    let mut nonce = Nonce::default();
    random(&mut nonce)?;
    let tag = cipher(key)
        .encrypt_in_place_detached(&nonce, &[], &mut body)
        .map_err(|_| io::Error::other("encryption failed"))?;
    Ok([&nonce[..], &body[..], &tag[..]].concat())
}

/// Fills a buffer from the kernel's random numbers.
pub(super) fn random(buffer: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(buffer)
}
