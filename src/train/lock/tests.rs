//! Who holds a run folder, whatever happens between two steps of who wants to.

use super::claim::Step;
use super::*;
use crate::hostname::hostname;
use std::time::Instant;

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_millis(400);

/// Until it holds the folder or is refused.
fn claimed(out: &Path) -> Result<RunLock> {
    let mut claim = Claim::new(out, SHORT, LONG, |_| ())?;
    loop {
        if let Some(lock) = claim.attempt()? {
            return Ok(lock);
        }
    }
}

/// Leaves the file of a holder like this process but for `change`.
fn left(out: &Path, change: impl FnOnce(&mut Holder)) -> (PathBuf, Holder) {
    let mut holder = Holder::this_process();
    change(&mut holder);
    let file = out.join(NAME).join(holder.file_name());
    fs::create_dir_all(out.join(NAME)).unwrap();
    fs::write(&file, holder.encoded().unwrap()).unwrap();
    (file, holder)
}

/// As a process of another number leaves it that has ended.
fn ended(holder: &mut Holder) {
    (holder.started, holder.number) = (holder.started + 1, 1);
}

/// What two starters find: nothing, what a release that was cut short leaves, what a killed holder leaves, and what a killed
/// starter leaves that was about to take its place.
const FOUND: [fn(&Path); 4] = [
    |_| (),
    |out| fs::create_dir(out.join(NAME)).unwrap(),
    |out| drop(left(out, ended)),
    |out| {
        let (file, holder) = left(out, ended);
        let taker = Holder { number: 2, ..holder };
        fs::rename(file, out.join(NAME).join(taker.file_name())).unwrap();
    },
];

/// Two starters and what they hold.
struct Two {
    out: tempfile::TempDir,
    patience: [Duration; 2],
    claims: [Claim; 2],
    locks: [Option<RunLock>; 2],
}

fn claim(out: &Path, patience: Duration) -> Claim {
    Claim::new(out, Duration::from_secs(600), patience, |_| ()).unwrap()
}

impl Two {
    fn new(found: fn(&Path), patience: [Duration; 2]) -> Self {
        let out = tempfile::tempdir().unwrap();
        found(out.path());
        let claims = patience.map(|patience| claim(out.path(), patience));
        Self { out, patience, claims, locks: [None, None] }
    }

    /// A step of a starter. One that holds the folder ends its run instead; one that is refused is started again.
    fn act(&mut self, starter: usize) {
        if self.locks[starter].take().is_some() {
            return;
        }
        match self.claims[starter].step() {
            Ok(Step::Held(lock)) => self.locks[starter] = Some(lock),
            Ok(Step::Goes | Step::Waits) => {}
            Err(refused) => {
                assert!(refused.to_string().contains(" is training in it"), "{refused}");
                self.claims[starter] = claim(self.out.path(), self.patience[starter]);
            }
        }
    }

    /// How many believe with reason that they hold the folder.
    fn holders(&self) -> usize {
        self.locks.iter().flatten().filter(|lock| lock.check().is_ok()).count()
    }
}

/// Every way in which two starters' steps, and the end of the run of one that holds, can follow each other, from all that may
/// be found: never two of them hold the folder, and in the end one does. One of them may take the other, which gives no sign
/// while it stands between two steps, for one that has ended.
#[test]
fn never_two_hold_a_folder_whatever_the_order_of_their_steps() {
    const STEPS: u32 = 8;
    const PATIENT: Duration = Duration::from_secs(600);
    for patience in [[PATIENT, PATIENT], [Duration::ZERO, PATIENT]] {
        let (mut both, mut disturbed) = (0, 0);
        for (found, order) in FOUND.iter().flat_map(|found| (0..1u32 << STEPS).map(move |order| (found, order))) {
            let mut two = Two::new(*found, patience);
            let mut had = [false; 2];
            for starter in (0..STEPS).map(|step| (order >> step & 1) as usize) {
                two.act(starter);
                let held = two.locks.iter().flatten().count();
                assert!(two.holders() <= 1, "{order:b}: both");
                assert!(two.holders() == held || patience[0].is_zero(), "{order:b}: a live holder has lost it");
                disturbed += held - two.holders();
                had[starter] |= two.locks[starter].is_some();
            }
            both += usize::from(had == [true, true]);
            // Whatever they leave, the next one has it, and leaves nothing.
            two.locks = [None, None];
            let mut last = claim(two.out.path(), Duration::ZERO);
            let step = |_| match last.step().unwrap() {
                Step::Held(lock) => Some(lock),
                _ => None,
            };
            (0..20).find_map(step).unwrap().check().unwrap();
            assert_eq!(fs::read_dir(two.out.path()).unwrap().count(), 0, "{order:b}: something is left");
        }
        assert!(both > 50, "{both}: the schedules are too short");
        assert_eq!(disturbed > 10, patience[0].is_zero(), "{disturbed}");
    }
}

#[test]
fn a_folder_is_held_by_one_run_and_free_after_it() {
    let out = tempfile::tempdir().unwrap();
    let lock = claimed(out.path()).unwrap();
    let refused = claimed(out.path()).err().unwrap();
    let who = format!("process {} on {}", std::process::id(), hostname());
    assert!(matches!(refused, Error::Usage(_)), "{refused}");
    assert!(refused.to_string().contains(&format!("{who} is training in it; end that run")), "{refused}");
    lock.check().unwrap();
    drop(lock);
    assert!(!out.path().join(NAME).exists());
    let since = Instant::now();
    drop(claimed(out.path()).unwrap());
    assert!(since.elapsed() < LONG);
}

#[test]
fn what_a_killed_process_left_is_taken_at_once() {
    let out = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    for change in [|holder: &mut Holder| holder.started += 1, |holder: &mut Holder| holder.started -= 1] {
        left(out.path(), change); // another process of the same number
        let since = Instant::now();
        drop(claimed(out.path()).unwrap());
        assert!(since.elapsed() < LONG, "{:?}", since.elapsed());
    }
    let (_, gone) = left(out.path(), |holder| holder.pid = child.id());
    assert!(gone.is_gone());
    fs::create_dir(out.path().join(format!("{STARTING}killed"))).unwrap();
    claimed(out.path()).unwrap().check().unwrap();
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn a_silent_machine_is_waited_for_and_one_that_gives_signs_is_not_disturbed() {
    let out = tempfile::tempdir().unwrap();
    let elsewhere = |holder: &mut Holder| (holder.machine, holder.host) = ("another".into(), "n9".into());
    left(out.path(), elsewhere);
    let since = Instant::now();
    drop(claimed(out.path()).unwrap());
    assert!(since.elapsed() >= LONG, "{:?}", since.elapsed());

    let (file, mut holder) = left(out.path(), |holder| {
        elsewhere(holder);
        holder.job = Some("77".into());
    });
    let refused = std::thread::scope(|scope| {
        let claim = scope.spawn(|| claimed(out.path()).err());
        while !claim.is_finished() {
            holder.sign_ms += 1;
            write_sign(&file, &holder).unwrap();
            std::thread::sleep(SHORT);
        }
        claim.join().unwrap().unwrap().to_string()
    });
    assert!(
        refused.contains(&format!("process {} on n9 (job 77) is training in it; end", std::process::id())),
        "{refused}"
    );
}

/// Who looked at a holder that had ended, and was not the first to take its place, says who was and whose it was.
#[test]
fn who_comes_second_says_what_happened() {
    let out = tempfile::tempdir().unwrap();
    let (file, mut holder) = left(out.path(), |holder| (holder.machine, holder.host) = ("another".into(), "n9".into()));
    let mut second = Claim::new(out.path(), SHORT, LONG, |_| ()).unwrap();
    assert!(matches!(second.step().unwrap(), Step::Waits));
    holder.number += 1;
    (holder.host, holder.pid) = ("n8".into(), 12);
    let taken = out.path().join(NAME).join(holder.file_name());
    fs::rename(file, &taken).unwrap();
    assert!(matches!(second.step().unwrap(), Step::Waits), "not yet signed");
    write_sign(&taken, &holder).unwrap();
    let refused = second.step().err().unwrap().to_string();
    let before = format!("since it took the place of process {} on n9; end that run", std::process::id());
    assert!(refused.contains("process 12 on n8 is training in it") && refused.contains(&before), "{refused}");
}

#[test]
fn a_run_that_was_stopped_for_long_learns_that_another_took_over() {
    let out = tempfile::tempdir().unwrap();
    let stopped = claimed(out.path()).unwrap();
    fs::remove_file(&stopped.file).unwrap();
    let (other, _) = left(out.path(), |holder| (holder.host, holder.number) = ("n9".into(), 1));
    let lost = stopped.check().unwrap_err().to_string();
    assert!(lost.contains(" on n9 took it over while this process gave no sign of life"), "{lost}");
    std::thread::sleep(3 * SHORT);
    drop(stopped);
    let names: Vec<_> = fs::read_dir(out.path().join(NAME)).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(names, [other], "the other's file stays, and no sign of life brings the own one back");
}

#[test]
fn a_folder_that_is_removed_or_moved_is_missed() {
    for moved in [true, false] {
        let parent = tempfile::tempdir().unwrap();
        let (out, elsewhere) = (parent.path().join("out"), parent.path().join("elsewhere"));
        let lock = claimed(&out).unwrap();
        if moved { fs::rename(&out, &elsewhere) } else { fs::remove_dir_all(&out) }.unwrap();
        let lost = lock.check().unwrap_err();
        assert_eq!(lost.exit_code(), 1);
        let said = format!("run folder {}: was removed or moved while this run wrote into it", out.display());
        assert!(lost.to_string().starts_with(&said), "{lost}");
        if moved {
            fs::rename(&elsewhere, &out).unwrap();
            lock.check().unwrap();
        }
    }
}

/// Whatever else stands at the lock's name: one line, at once, and nobody waits for a pipe's other end.
#[test]
fn what_no_run_left_is_refused() {
    let fifo = |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
    type Made<'a> = (&'a str, &'a dyn Fn(&Path));
    let made: [Made; 7] = [
        ("is no folder", &|path| std::os::unix::fs::symlink("nowhere", path).unwrap()),
        ("is no folder", &|path| std::os::unix::fs::symlink(".", path).unwrap()),
        ("is no folder", &fifo),
        ("is no folder", &|path| fs::write(path, "{}").unwrap()),
        ("holds x, which no run has written", &|path| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("x"), "").unwrap();
        }),
        ("holds x, which is no file", &|path| {
            fs::create_dir(path).unwrap();
            fifo(&path.join("x"));
        }),
        ("holds more than one file", &|path| {
            fs::create_dir(path).unwrap();
            ["x", "y"].into_iter().for_each(|name| fs::write(path.join(name), "").unwrap());
        }),
    ];
    for (said, make) in made {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join(NAME);
        make(&path);
        let since = Instant::now();
        let error = claimed(out.path()).err().unwrap();
        assert!(since.elapsed() < LONG && error.exit_code() == 2, "{error}");
        let line = format!("{}: {said}, and not what a run leaves there; remove it, or pass", path.display());
        assert!(error.to_string().starts_with(&line), "{error}");
    }
}

#[test]
fn a_folder_that_cannot_be_made_is_a_mistake() {
    for out in ["/proc/none", "/etc/passwd/none"] {
        let error = claimed(Path::new(out)).err().unwrap();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert!(error.to_string().starts_with(&format!("run folder {out}: cannot be made or written (")), "{error}");
    }
}
