//! The word that proves to a reward server that a request comes from a run of its users.

use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use ureq::http::HeaderValue;

/// Characters of a token, at least: one that is shorter can be guessed. At most: a header must hold it.
const SHORTEST: usize = 16;
const LONGEST: usize = 1024;
/// Different characters, at least: of 16 random digits fewer are one in 80,000.
const LEAST_DIFFERENT: usize = 5;

/// A shared secret. It is never printed: not by `Debug`, not in an error, not in a log.
#[derive(Clone)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// A token that is long enough and fits into a header; white space around it is no part of it.
    ///
    /// # Errors
    /// What is wrong with it and what to do, without the token.
    pub fn new(text: &str) -> std::result::Result<Self, String> {
        const REMEDY: &str = "make one with: openssl rand -hex 32";
        let token = text.trim();
        match token.len() {
            0 => Err(format!("holds no token; {REMEDY}")),
            _ if !token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(format!("must be one line of letters, digits and signs without spaces; {REMEDY}"))
            }
            length if !(SHORTEST..=LONGEST).contains(&length) => {
                Err(format!("has {length} characters, and must have from {SHORTEST} to {LONGEST}; {REMEDY}"))
            }
            _ if token.bytes().collect::<BTreeSet<_>>().len() < LEAST_DIFFERENT => {
                let message = "consists of few characters, again and again, and can be guessed";
                Err(format!("{message}; {REMEDY}"))
            }
            _ => Ok(Self(token.to_string())),
        }
    }

    /// The token in a file that nobody but its owner may read.
    ///
    /// # Errors
    /// [`Error::Usage`]: it cannot be read, others can read it, or it holds no token.
    pub fn read(path: &Path) -> Result<Self> {
        let usage = |message: String| Error::Usage(format!("--token-file {}: {message}", path.display()));
        let metadata = fs::metadata(path).map_err(|e| usage(e.to_string()))?;
        if !metadata.is_file() {
            return Err(usage("is not a regular file; write the token into one".into()));
        }
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            let path = path.display();
            return Err(usage(format!("others may read or write it (mode {mode:03o}); chmod 600 {path}")));
        }
        let mut text = String::new();
        let file = File::open(path).map_err(|e| usage(e.to_string()))?;
        file.take(2 * LONGEST as u64).read_to_string(&mut text).map_err(|e| usage(e.to_string()))?;
        Self::new(&text).map_err(usage)
    }

    /// Whether `given` is the token. Digests are compared, in constant time: how long it takes tells nothing.
    pub fn is(&self, given: &str) -> bool {
        blake3::hash(given.as_bytes()) == blake3::hash(self.0.as_bytes())
    }

    /// The value of the header `Authorization`, marked as what must not be shown.
    pub fn authorization(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// What a server says, without the token: some repeat in an error what they were sent.
    pub fn hidden_in(&self, said: Vec<u8>) -> Vec<u8> {
        let token = self.0.as_bytes();
        let Some(first) = said.windows(token.len()).position(|window| window == token) else { return said };
        let rest = self.hidden_in(said[first + token.len()..].to_vec());
        [&said[..first], b"(token)", &rest].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "0123456789abcdef";

    #[test]
    fn what_can_be_guessed_or_sent_by_no_header_is_no_token() {
        for (text, said) in [
            ("", "holds no token"),
            (" \n", "holds no token"),
            ("x", "has 1 characters"),
            ("0123456789abcde", "has 15 characters"),
            ("aaaaaaaaaaaaaaaaaaaa", "consists of few characters, again and again"),
            ("abcdabcdabcdabcd", "consists of few characters, again and again"),
            ("0123456789 abcdef", "without spaces"),
            ("0123456789abcdef\n0123456789abcdef", "must be one line"),
            ("0123456789abcdéf", "must be one line"),
        ] {
            let error = Token::new(text).unwrap_err();
            assert!(error.contains(said) && error.contains("openssl rand -hex 32"), "{text:?}: {error}");
            assert!(text.trim().len() < 2 || !error.contains(text.trim()), "{error}");
        }
        assert!(Token::new(&"x".repeat(LONGEST + 1)).is_err());
        let token = Token::new(&format!("{GOOD}\n")).unwrap();
        assert!(token.is(GOOD) && !token.is("0123456789abcdeF") && !token.is(""));
    }

    #[test]
    fn a_token_shows_itself_nowhere() {
        let token = Token::new(GOOD).unwrap();
        let header = token.authorization().unwrap();
        assert_eq!(header, format!("Bearer {GOOD}"));
        assert!(!format!("{token:?} {header:?}").contains(GOOD));
        let said = format!("no {GOOD}, no {GOOD}{GOOD}").into_bytes();
        assert_eq!(token.hidden_in(said), b"no (token), no (token)(token)");
        assert_eq!(token.hidden_in(b"well".to_vec()), b"well");
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, GOOD).unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Token::read(&path);
            assert_eq!(read.is_ok(), good, "{mode:o}");
            let Err(error) = read else { continue };
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().ends_with(&format!("(mode {mode:o}); chmod 600 {}", path.display())), "{error}");
        }
        for path in ["/dev/null", "/", "/no/such"] {
            assert_eq!(Token::read(Path::new(path)).unwrap_err().exit_code(), 2, "{path}");
        }
    }
}
