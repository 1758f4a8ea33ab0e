//! The two processes of `ring`: the one that measures sets everything up and says which transport is next; the other one
//! echoes on it as often as it was told, then waits for the next order. Nothing spins while it is not its turn.

use super::cache_line::{LineCaller, LineEcho};
use super::ours::{OursCaller, OursEcho};
use super::socket::{SocketCaller, SocketEcho};
use super::{Caller, Transport, iceoryx};
use crate::machine;
use anyhow::{Context, bail, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use shm_os::Doorbell;
use shm_os::lane_mapping::LaneMapping;
use shm_os::socket::{recv_with_fds, send_with_fds};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long the peer may take to get ready.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of an order: transport, round trips, core; each a little-endian u32.
const ORDER_BYTES: usize = 12;
/// What the peer says when it is ready for what was ordered.
const READY: u8 = 1;

/// Arguments of the peer process.
#[derive(Debug, clap::Args)]
pub(crate) struct PeerArguments {
    /// Size of a payload in bytes.
    #[arg(long)]
    bytes: usize,
    /// Where iceoryx2 keeps its files.
    #[arg(long)]
    iceoryx_root: String,
}

/// The measuring side: one peer process and the asking end of every transport.
pub(super) struct Setup {
    bytes: usize,
    control: UnixStream,
    ours_polled: OursCaller,
    iceoryx: iceoryx::IceoryxCaller,
    socket: SocketCaller,
    line: LineCaller,
    peer: Child,
    // Dropped last: iceoryx2's files lie in it.
    _root: tempfile::TempDir,
}

impl Setup {
    /// Starts the peer and connects every transport for payloads of `bytes`.
    pub(super) fn new(bytes: usize) -> anyhow::Result<Setup> {
        let root = tempfile::Builder::new().prefix("bench-ring-").tempdir().context("making a folder")?;
        let iceoryx_root =
            root.path().to_str().context("the temporary folder's name is not UTF-8")?.to_owned();
        let (region, mapping) = LaneMapping::create(1)?;
        let bell = Doorbell::new()?;
        let (line, line_mapping) = LaneMapping::create(2)?;
        let (socket, peer_socket) = UnixStream::pair()?;
        let (mut control, peer_control) = UnixStream::pair()?;
        let peer = Command::new(std::env::current_exe()?)
            .args(["ring-peer", "--bytes", &bytes.to_string(), "--iceoryx-root", &iceoryx_root])
            .stdin(Stdio::from(OwnedFd::from(peer_control)))
            .spawn()
            .context("starting the echoing process")?;
        control.set_read_timeout(Some(READY_WITHIN))?;
        send_with_fds(
            control.as_fd(),
            &[READY],
            &[region.as_fd(), bell.as_fd(), line.as_fd(), peer_socket.as_fd()],
        )?;
        expect_ready(&mut control)?;
        mapping.prefault_tables();
        Ok(Setup {
            bytes,
            control,
            ours_polled: OursCaller::new(mapping, bell)?,
            iceoryx: iceoryx::IceoryxCaller::new(&iceoryx_root, bytes)?,
            socket: SocketCaller::new(socket)?,
            line: LineCaller::new(line_mapping),
            peer,
            _root: root,
        })
    }

    /// Bytes of a payload.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Has the peer echo `round_trips` times on `transport`, from `core`.
    pub(super) fn begin(
        &mut self,
        transport: Transport,
        round_trips: u32,
        core: usize,
    ) -> anyhow::Result<&mut dyn Caller> {
        let mut order = [0; ORDER_BYTES];
        order[0..4].copy_from_slice(&(transport as u32).to_le_bytes());
        order[4..8].copy_from_slice(&round_trips.to_le_bytes());
        order[8..12].copy_from_slice(&u32::try_from(core)?.to_le_bytes());
        self.control.write_all(&order)?;
        expect_ready(&mut self.control)?;
        let woken = matches!(transport, Transport::OursWoken | Transport::Iceoryx2Events);
        Ok(match transport {
            Transport::OursPolled | Transport::OursWoken => self.ours_polled.woken(woken),
            Transport::Iceoryx2Polled | Transport::Iceoryx2Events => self.iceoryx.events(woken),
            Transport::UnixSocket => &mut self.socket,
            Transport::CacheLine => &mut self.line,
        })
    }

    /// Waits until the peer has done what [`Setup::begin`] ordered.
    pub(super) fn end(&mut self) -> anyhow::Result<()> {
        expect_ready(&mut self.control)
    }

    /// Ends the peer.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        let Setup { control, mut peer, .. } = self;
        drop(control);
        let status = peer.wait()?;
        ensure!(status.success(), "the echoing process ended with {status}");
        Ok(())
    }
}

fn expect_ready(control: &mut UnixStream) -> anyhow::Result<()> {
    let mut byte = [0];
    control.read_exact(&mut byte).context("waiting for the echoing process")?;
    ensure!(byte == [READY], "the echoing process said {byte:?}");
    Ok(())
}

/// The peer process: its standard input is the control socket.
///
/// # Errors
/// When anything fails; the measuring side sees the end of the control socket.
pub(crate) fn run_peer(arguments: &PeerArguments) -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let mut control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut fds = Vec::new();
    let mut byte = [0];
    recv_with_fds(control.as_fd(), &mut byte, &mut fds, 4)?;
    let Ok([region, bell, line, socket]) = <[OwnedFd; 4]>::try_from(fds) else {
        bail!("descriptors are missing")
    };
    let mut ours = OursEcho::new(LaneMapping::map(region.as_fd())?, Doorbell::from_received(bell)?)?;
    let mut line = LineEcho::new(LaneMapping::map(line.as_fd())?);
    let mut socket = SocketEcho::new(UnixStream::from(socket), arguments.bytes);
    let mut iceoryx = iceoryx::IceoryxEcho::new(&arguments.iceoryx_root, arguments.bytes)?;
    control.write_all(&[READY])?;
    let mut order = [0; ORDER_BYTES];
    loop {
        // The end of the socket between two orders is the end of the bench.
        if control.read(&mut order[..1])? == 0 {
            return Ok(());
        }
        control.read_exact(&mut order[1..])?;
        let word = |at: usize| u32::from_le_bytes([order[at], order[at + 1], order[at + 2], order[at + 3]]);
        let (transport, round_trips, core) = (word(0), word(4), word(8));
        let transport = Transport::ALL
            .into_iter()
            .find(|t| *t as u32 == transport)
            .with_context(|| format!("no transport {transport}"))?;
        machine::pin(core as usize)?;
        control.write_all(&[READY])?;
        match transport {
            Transport::OursPolled => ours.echo_polled(round_trips)?,
            Transport::OursWoken => ours.echo_woken(round_trips)?,
            Transport::Iceoryx2Polled => iceoryx.echo(round_trips, false)?,
            Transport::Iceoryx2Events => iceoryx.echo(round_trips, true)?,
            Transport::UnixSocket => socket.echo(round_trips)?,
            Transport::CacheLine => line.echo(round_trips)?,
        }
        control.write_all(&[READY])?;
    }
}
