//! Alone in its binary, since it counts what the whole process holds: mappings and descriptors go with their owners.

use std::os::fd::AsFd;

use shm_os::image_backing::{ImageBacking, ImageFile, ImageKey, PosixShm, SealedMemfd};
use shm_os::socket::{self, AllowedPeer};
use shm_os::{Doorbell, Interest, Poller, SharedMapping, live_mappings, mapping, memfd};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn everything_is_given_back() {
    let temp = tempfile::tempdir().unwrap();
    let cache = ImageFile::open(&temp.path().join("cache")).unwrap();
    let socket_path = temp.path().join("run/s");
    let mut before = None;
    for round in 0..20 {
        for backing in [&SealedMemfd as &dyn ImageBacking, &cache, &PosixShm] {
            let key = ImageKey::new("image").unwrap();
            let image = backing.reserve(&key, 5000).unwrap().publish().unwrap();
            let _mapped = (image.map().unwrap(), image.map().unwrap());
            assert!(image.map().is_ok() && backing.reserve(&key, 5000).is_ok());
            assert!(shm_os::image_backing::map_published(image.fd_read_only.as_fd(), image.kind, 1).is_err());
        }
        let region = memfd::create_lane_region(1 << 16).unwrap();
        let _lane = SharedMapping::map_lane(region.as_fd(), 1 << 16).unwrap();
        let (_page, _page_fd) = mapping::create_broker_page(4096).unwrap();
        assert_eq!(live_mappings(), 2);

        let listener = socket::bind_listener(&socket_path).unwrap();
        let client =
            socket::connect(&socket_path, std::time::Duration::from_secs(5), AllowedPeer::SameUser).unwrap();
        let server = listener.accept().unwrap().unwrap();
        let (bell, poller) = (Doorbell::new().unwrap(), Poller::new().unwrap());
        poller.add(&bell, 1, Interest::DOORBELL).unwrap();
        socket::send_with_fds(server.as_fd(), b"x", &[bell.as_fd(), region.as_fd()]).unwrap();
        let mut fds = Vec::new();
        // Too many descriptors in every other round.
        let result = socket::recv_with_fds(client.as_fd(), &mut [0; 1], &mut fds, 2 - round % 2);
        assert_eq!(result.is_err(), round % 2 == 1);
        let _peer = server.peer_pidfd().unwrap();
        drop((client, server, listener, bell, poller, region, fds, _peer, _lane, _page, _page_fd));

        assert_eq!(live_mappings(), 0);
        // The first round opens what stays open (none today); later ones must add nothing.
        assert_eq!(*before.get_or_insert_with(open_descriptors), open_descriptors());
    }
}
