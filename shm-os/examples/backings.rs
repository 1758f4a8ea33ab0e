//! Measures the image backings, for the choice of the default: filling, publishing, mapping, first touch, and what a
//! restart costs. Run with `cargo run --release -p shm-os --example backings -- [--cache DIR] [MiB ...]`.
//! Default: 90 and 2048 MiB, three rounds each, the best of each figure; the cache folder is made in the system's
//! temporary folder and removed again.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shm_os::ReadOnlyMapping;
use shm_os::image_backing::{
    ImageBacking, ImageFile, ImageKey, PosixShm, PublishedImage, SealedMemfd, copy_image_into_sealed_memfd,
    shared_memory_huge_pages,
};

const ROUNDS: usize = 3;
const PAGE_BYTES: usize = 4096;

/// The best figures of one backing at one size.
#[derive(Clone, Copy)]
struct Figures {
    fill: Duration,
    publish: Duration,
    map: Duration,
    touch: Duration,
    touch_again: Duration,
    populate: Duration,
    restart: Duration,
}

impl Figures {
    const WORST: Figures = Figures {
        fill: Duration::MAX,
        publish: Duration::MAX,
        map: Duration::MAX,
        touch: Duration::MAX,
        touch_again: Duration::MAX,
        populate: Duration::MAX,
        restart: Duration::MAX,
    };

    fn best_of(self, other: Figures) -> Figures {
        Figures {
            fill: self.fill.min(other.fill),
            publish: self.publish.min(other.publish),
            map: self.map.min(other.map),
            touch: self.touch.min(other.touch),
            touch_again: self.touch_again.min(other.touch_again),
            populate: self.populate.min(other.populate),
            restart: self.restart.min(other.restart),
        }
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed())
}

fn touch(mapping: &ReadOnlyMapping) {
    let sum: u64 = mapping.as_bytes().iter().step_by(PAGE_BYTES).map(|byte| u64::from(*byte)).sum();
    black_box(sum);
}

fn measure(backing: &dyn ImageBacking, source: &File, len_bytes: u64) -> Result<Figures, Box<dyn Error>> {
    let key = ImageKey::new("measured")?;
    let block: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (writer, fill) = timed(|| {
        let mut writer = backing.reserve(&key, len_bytes)?;
        writer.window().chunks_mut(block.len()).for_each(|part| part.copy_from_slice(&block[..part.len()]));
        Ok::<_, shm_os::image_backing::BackingError>(writer)
    });
    let writer = writer?;
    let (image, publish) = timed(|| writer.publish());
    let image = image?;
    // What a second process pays; a mapping of its own costs the same in this one.
    let (mapping, map) = timed(|| image.map());
    let mapping = mapping?;
    let ((), first) = timed(|| touch(&mapping));
    let ((), touch_again) = timed(|| touch(&mapping));
    let fresh = image.map()?;
    let (result, populate) = timed(|| fresh.prefault(0, fresh.len_bytes()));
    result?;
    drop((mapping, fresh));
    let restart = restart(backing, &key, image, source, len_bytes)?;
    backing.remove(&key)?;
    Ok(Figures { fill, publish, map, touch: first, touch_again, populate, restart })
}

/// From "the broker is new" to "an image is mapped": open the file again, or copy it into memory again.
fn restart(
    backing: &dyn ImageBacking,
    key: &ImageKey,
    image: PublishedImage,
    source: &File,
    len_bytes: u64,
) -> Result<Duration, Box<dyn Error>> {
    drop(image);
    let start = Instant::now();
    let again = match backing.open_existing(key)? {
        Some(again) => again,
        None => {
            let mut writer = backing.reserve(key, len_bytes)?;
            writer.fill_from_file(source, &mut |_| true)?;
            writer.publish()?
        }
    };
    black_box(again.map()?.len_bytes());
    Ok(start.elapsed())
}

/// Ways to copy a cached file into a memfd, each into a fresh one.
fn copy_ways(source: &File, len_bytes: u64) -> Result<(), Box<dyn Error>> {
    let len = usize::try_from(len_bytes)?;
    let new = || shm_os::memfd::create_writable_image(len_bytes);
    let report = |name: &str, time: Duration| {
        println!(
            "  {name:<44} {:>9.1} ms  {:>6.2} GB/s",
            ms(time),
            len_bytes as f64 / time.as_secs_f64() / 1e9
        );
    };
    let best = |work: &dyn Fn(OwnedFd) -> Result<(), Box<dyn Error>>| -> Result<Duration, Box<dyn Error>> {
        let mut best = Duration::MAX;
        for _ in 0..ROUNDS {
            let fd = new()?;
            let (result, time) = timed(|| work(fd));
            result?;
            best = best.min(time);
        }
        Ok(best)
    };
    for buffer_bytes in [64 << 10, 256 << 10, 1 << 20, 8 << 20] {
        let time = best(&|fd| {
            let (target, mut buffer, mut done) = (File::from(fd), vec![0; buffer_bytes], 0u64);
            while done < len_bytes {
                let got = std::os::unix::fs::FileExt::read_at(source, &mut buffer, done)?;
                std::os::unix::fs::FileExt::write_all_at(&target, &buffer[..got], done)?;
                done += got as u64;
            }
            Ok(())
        })?;
        report(&format!("pread + pwrite, {} KiB", buffer_bytes >> 10), time);
    }
    let time = best(&|fd| {
        // SAFETY: both objects are this program's own and constant in length for the duration.
        let (from, mut to) = unsafe { (memmap2::Mmap::map(source)?, memmap2::MmapMut::map_mut(&fd)?) };
        to.copy_from_slice(&from[..len]);
        Ok(())
    })?;
    report("mmap to mmap", time);
    let time = best(&|fd| {
        // SAFETY: as above.
        let from = unsafe { memmap2::Mmap::map(source)? };
        from.advise(memmap2::Advice::PopulateRead)?;
        (&File::from(fd)).write_all(&from[..len])?;
        Ok(())
    })?;
    report("mmap, then write", time);
    let sendfile = best(&|fd| {
        let mut done = 0i64;
        while (done as u64) < len_bytes {
            // SAFETY: works on two open descriptors and a local offset.
            let sent = unsafe { libc::sendfile(fd.as_raw_fd(), source.as_raw_fd(), &raw mut done, 64 << 20) };
            if sent <= 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        Ok(())
    });
    match sendfile {
        Ok(time) => report("sendfile", time),
        Err(error) => println!("  sendfile: {error}"),
    }
    let range = best(&|fd| {
        let (mut from, mut to) = (0i64, 0i64);
        while (from as u64) < len_bytes {
            // SAFETY: works on two open descriptors and local offsets.
            let sent = unsafe {
                libc::copy_file_range(
                    source.as_raw_fd(),
                    &raw mut from,
                    fd.as_raw_fd(),
                    &raw mut to,
                    64 << 20,
                    0,
                )
            };
            if sent <= 0 {
                return Err(std::io::Error::last_os_error().into());
            }
        }
        Ok(())
    });
    match range {
        Ok(time) => report("copy_file_range", time),
        Err(error) => println!("  copy_file_range: {error}"),
    }
    let mut library = Duration::MAX;
    for _ in 0..ROUNDS {
        let (image, time) = timed(|| copy_image_into_sealed_memfd(source, len_bytes, &mut |_| true));
        image?;
        library = library.min(time);
    }
    report("copy_image_into_sealed_memfd (with seals)", library);
    Ok(())
}

/// First touch of a file whose pages are not in memory.
fn cold_file(path: &Path, len_bytes: u64) -> Result<Duration, Box<dyn Error>> {
    let backing = ImageFile::open(path)?;
    let key = ImageKey::new("cold")?;
    let mut writer = backing.reserve(&key, len_bytes)?;
    writer.window().chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 1);
    let image = writer.publish()?;
    // SAFETY: advice about an open descriptor.
    unsafe { libc::posix_fadvise(image.fd_read_only.as_fd().as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    let mapping = image.map()?;
    let ((), time) = timed(|| touch(&mapping));
    backing.remove(&key)?;
    Ok(time)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn per_call(name: &str, call: impl Fn() -> u64) {
    const CALLS: u32 = 2_000_000;
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        best = best.min(timed(|| (0..CALLS).for_each(|_| _ = black_box(call()))).1);
    }
    println!("  {name:<44} {:>9.2} ns", best.as_secs_f64() * 1e9 / f64::from(CALLS));
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut sizes_mib, mut cache) = (Vec::new(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--cache" => cache = arguments.next().map(PathBuf::from),
            number => sizes_mib.push(number.parse::<u64>()?),
        }
    }
    if sizes_mib.is_empty() {
        sizes_mib = vec![90, 2048];
    }
    let temp = match &cache {
        Some(path) => tempfile::tempdir_in(path)?,
        None => tempfile::tempdir()?,
    };
    println!(
        "huge pages for shared memory: {}; cores: {}",
        shared_memory_huge_pages(),
        shm_os::process::cores_allowed()
    );
    println!("per call:");
    per_call("fork_generation()", shm_os::fork_generation);
    per_call("getpid system call", || u64::from(std::process::id()));
    per_call("monotonic_ns()", shm_os::process::monotonic_ns);
    for mib in sizes_mib {
        let len_bytes = mib << 20;
        let source_path = temp.path().join("source");
        let mut source =
            File::options().read(true).write(true).create(true).truncate(true).open(&source_path)?;
        let block = vec![0x5a; 1 << 20];
        for _ in 0..mib {
            source.write_all(&block)?;
        }
        source.sync_all()?;
        println!("\n{mib} MiB, best of {ROUNDS}, ms:");
        println!("  backing      fill   publish   map    touch   again  populate  restart+map");
        let file = ImageFile::open(&temp.path().join("cache"))?;
        for backing in [&SealedMemfd as &dyn ImageBacking, &file, &PosixShm] {
            let mut best = Figures::WORST;
            for _ in 0..ROUNDS {
                best = best.best_of(measure(backing, &source, len_bytes)?);
            }
            println!(
                "  {:<10} {:>7.1} {:>8.1} {:>7.3} {:>7.1} {:>7.1} {:>8.1} {:>9.3}",
                backing.kind().name(),
                ms(best.fill),
                ms(best.publish),
                ms(best.map),
                ms(best.touch),
                ms(best.touch_again),
                ms(best.populate),
                ms(best.restart),
            );
        }
        println!(
            "  file, not in memory: first touch {:.1} ms",
            ms(cold_file(&temp.path().join("cache"), len_bytes)?)
        );
        println!("copying a cached file into a memfd:");
        copy_ways(&source, len_bytes)?;
    }
    Ok(())
}
