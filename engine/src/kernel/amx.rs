//! AMX tiles: permission, configuration, and products of 32 rows with one panel. Only what the CPU does; no layers.
//!
//! The compiler knows nothing of tile registers on stable Rust, so they are used inside single blocks of assembly only,
//! between [`Session::start`] and the session's end. Source of encodings: Intel's Software Developer's Manual, volume 1,
//! chapter 18 (AMX) and Linux' `Documentation/arch/x86/xstate.rst` (permission).

use super::product::{PANEL_COLUMNS, Target};
use std::arch::asm;
use std::marker::PhantomData;

/// Bytes of `k` that one step takes from each row: a tile's row.
pub(super) const STEP_BYTES: usize = 64;

/// Whether CPU and kernel have AMX for bf16 and int8, and this process may use it. Asks the kernel for permission.
pub(super) fn is_usable() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the caller checked OSXSAVE, so XGETBV exists; register 0 always does.
        unsafe { _xgetbv(0) }
    }
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    if __cpuid_count(7, 0).edx & BF16_TILE_INT8 != BF16_TILE_INT8 {
        return false;
    }
    // SAFETY: OSXSAVE was just found, which implies XSAVE.
    if unsafe { enabled_state() } & TILE_STATE != TILE_STATE {
        return false;
    }
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    // SAFETY: a system call that takes two numbers and touches no memory of ours; threads made later inherit the permission,
    // and those that exist have it too, since it is the process's.
    unsafe { nix::libc::syscall(nix::libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles: sixteen rows of 64 bytes.
static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Bytes from `next` on that each step asks the second-level cache for.
pub(super) const STEP_PREFETCH_BYTES: usize = 384;

/// Four accumulators (tmm0-3): rows 0-15 and 16-31 times columns 0-15 and 16-31.
macro_rules! products {
    ($multiply:literal, $a:expr, $stride_bytes:expr, $panel:expr, $steps:expr, $out:expr, $next:expr) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {stride}]",
            "tileloadd tmm6, [{panel} + {panel_stride}]",
            concat!($multiply, " tmm0, tmm4, tmm6"),
            "prefetcht1 [{next}]",
            "prefetcht1 [{next} + 64]",
            "tileloadd tmm7, [{panel} + {panel_stride} + 64]",
            concat!($multiply, " tmm1, tmm4, tmm7"),
            "prefetcht1 [{next} + 128]",
            "prefetcht1 [{next} + 192]",
            "tileloadd tmm5, [{below} + {stride}]",
            concat!($multiply, " tmm2, tmm5, tmm6"),
            concat!($multiply, " tmm3, tmm5, tmm7"),
            "prefetcht1 [{next} + 256]",
            "prefetcht1 [{next} + 320]",
            "add {next}, 384",
            "add {a}, 64",
            "add {below}, 64",
            "add {panel}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {out_stride}], tmm0",
            "tilestored [{out} + {out_stride} + 64], tmm1",
            "tilestored [{out_below} + {out_stride}], tmm2",
            "tilestored [{out_below} + {out_stride} + 64], tmm3",
            a = inout(reg) $a => _,
            below = inout(reg) $a.wrapping_add(16 * $stride_bytes) => _,
            panel = inout(reg) $panel => _,
            steps = inout(reg) $steps => _,
            next = inout(reg) $next => _,
            stride = in(reg) $stride_bytes,
            panel_stride = in(reg) 4 * PANEL_COLUMNS,
            out = in(reg) $out.start,
            out_below = in(reg) $out.start.wrapping_add(16 * $out.stride),
            out_stride = in(reg) 4 * $out.stride,
            options(nostack),
        )
    };
}

/// This thread's tiles, configured while this value lives.
pub(super) struct Session(PhantomData<*const ()>);

impl Session {
    /// Configures the tiles.
    ///
    /// # Safety
    /// [`is_usable`] must have been true.
    pub(super) unsafe fn start() -> Session {
        // SAFETY: AMX is usable (the caller's promise) and the configuration is a valid one for palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags)) };
        Session(PhantomData)
    }

    /// `out[r, c] = Σ a[r, k] · panel[k, c]` for 32 rows and columns, bf16 pairs to f32.
    /// Meanwhile [`STEP_PREFETCH_BYTES`] a step are fetched from `next` on, which need not be readable.
    ///
    /// # Safety
    /// 32 rows of `steps * 64` bytes at `a`, `stride_bytes` apart, and `steps * 2048` bytes at `panel` must be readable,
    /// 32 rows of 32 at `out` writable.
    #[inline]
    pub(super) unsafe fn bf16(
        &self,
        a: *const u8,
        stride_bytes: usize,
        panel: *const u8,
        steps: usize,
        out: Target<f32>,
        next: *const u8,
    ) {
        // SAFETY: handed through from the caller; tiles are configured while `self` lives.
        unsafe { products!("tdpbf16ps", a, stride_bytes, panel, steps, out, next) };
    }

    /// As [`Session::bf16`], u8 rows and i8 panel to i32, whose bits are written.
    ///
    /// # Safety
    /// As [`Session::bf16`].
    #[inline]
    pub(super) unsafe fn int8(
        &self,
        a: *const u8,
        stride_bytes: usize,
        panel: *const u8,
        steps: usize,
        out: Target<f32>,
        next: *const u8,
    ) {
        // SAFETY: handed through from the caller; tiles are configured while `self` lives.
        unsafe { products!("tdpbusd", a, stride_bytes, panel, steps, out, next) };
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: tiles were configured by `start`; released, they cost nothing at a switch of threads.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
