//! Both ends of a plain Unix stream socket: blocking writes and reads, nothing else.

use super::{Caller, STUCK_AFTER};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// The asking end.
pub(super) struct SocketCaller {
    stream: UnixStream,
}

impl SocketCaller {
    /// Takes a connected stream.
    pub(super) fn new(stream: UnixStream) -> anyhow::Result<SocketCaller> {
        stream.set_read_timeout(Some(STUCK_AFTER))?;
        Ok(SocketCaller { stream })
    }
}

impl Caller for SocketCaller {
    fn call(&mut self, input: &[u8], output: &mut Vec<u8>) -> anyhow::Result<()> {
        self.stream.write_all(input)?;
        output.resize(input.len(), 0);
        self.stream.read_exact(output)?;
        Ok(())
    }
}

/// The echoing end.
pub(super) struct SocketEcho {
    stream: UnixStream,
    payload: Vec<u8>,
}

impl SocketEcho {
    /// Takes a connected stream that carries payloads of `bytes`.
    pub(super) fn new(stream: UnixStream, bytes: usize) -> SocketEcho {
        SocketEcho { stream, payload: vec![0; bytes] }
    }

    /// Echoes so many times.
    pub(super) fn echo(&mut self, round_trips: u32) -> anyhow::Result<()> {
        for _ in 0..round_trips {
            self.stream.read_exact(&mut self.payload)?;
            self.stream.write_all(&self.payload)?;
        }
        Ok(())
    }
}
