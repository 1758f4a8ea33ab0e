//! The one error type for a failed system call: what was tried, what the system said, what helps.
//! Checks of our own (sizes, seals, owners) must not be here: they belong to the module that makes them.

use std::borrow::Cow;
use std::io;

/// A system call failed. Displays the action, the system's reason and a way out.
#[derive(Debug, thiserror::Error)]
#[error("{action} failed: {source}{}", fix_for(source))]
pub struct OsError {
    action: Cow<'static, str>,
    source: io::Error,
}

impl OsError {
    /// `action` is a noun phrase such as "creating the lane's memory object".
    pub fn new(action: impl Into<Cow<'static, str>>, source: impl Into<io::Error>) -> Self {
        Self { action: action.into(), source: source.into() }
    }

    /// The calling thread's `errno` with `action`; call it right after the failed call.
    pub fn last(action: impl Into<Cow<'static, str>>) -> Self {
        Self::new(action, io::Error::last_os_error())
    }

    /// The `errno` behind this error, if a system call gave one.
    pub fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// The error's kind as the standard library sorts it.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

impl From<OsError> for io::Error {
    fn from(error: OsError) -> Self {
        io::Error::new(error.source.kind(), error)
    }
}

/// What a user can do about an errno, as a clause to append; empty where the reason says it all.
fn fix_for(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EMFILE) => "; raise this process's limit of open files (ulimit -n)",
        Some(libc::ENFILE) => {
            "; the machine is out of file descriptors: raise fs.file-max or stop other programs"
        }
        Some(libc::ENOSPC) => "; free space on that file system or choose another cache folder",
        Some(libc::EDQUOT) => "; the disk quota is used up: free space or choose another cache folder",
        Some(libc::ENOMEM) => {
            "; free memory, raise the memory limit (ulimit -v), or vm.max_map_count if there are many mappings"
        }
        Some(libc::EACCES) | Some(libc::EPERM) => {
            "; check the owner and mode, and that no sandbox forbids it"
        }
        Some(libc::EROFS) => "; the file system is read-only: choose another folder",
        Some(libc::ENOSYS) => "; this kernel or sandbox lacks the call: Linux 5.4 or newer is needed",
        Some(libc::EIO) => "; the disk reported an error: check the system log",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_action_reason_and_fix() {
        let text = OsError::new("opening x", io::Error::from_raw_os_error(libc::EMFILE)).to_string();
        assert!(text.starts_with("opening x failed: "), "{text}");
        assert!(text.contains("ulimit -n"), "{text}");
    }

    #[test]
    fn keeps_errno_through_io_error_kind() {
        let error = OsError::new("x", io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.errno(), Some(libc::ENOENT));
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::NotFound);
    }
}
