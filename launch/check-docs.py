#!/usr/bin/env python3
"""Checks the documents: links, paths and command lines. Needs Python 3.9 and a built program.

    python3 launch/check-docs.py target/release/flowrl-dist

Links: every relative link, image and heading that a document links to is there.
Paths: what a document names in code (`configs/...`, `launch/...`) is there, and so are the
documents that code, scripts and configurations name. docs/README.md has every room of src/.
Commands: in the documents of COMMANDS, every line of a code block, and every `flowrl-dist ...`,
`cargo test ...` and the like in a sentence or a table. The program's commands and options are those
of its --help, and a run whose configuration is in this repository must pass `plan`. Scripts, tests
and benches are there. Other programs are in OUTSIDE, which says what they need.
Containers: what packaging/ copies, and the stages that it copies from, are there.

LOG.md, CHANGELOG.md and the dated decisions tell the past: only their links are checked.
Exit code: 0 all is well; 1 something is not, with file and line; 2 wrong usage.
"""

import glob
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMANDS = {
    "README.md", "CONTRIBUTING.md", "docs/CLUSTER.md", "docs/EXTENDING.md", "docs/INSTALL.md",
    "docs/METRICS.md", "docs/REWARDS.md", "docs/SCALING.md", "docs/TUTORIAL.md",
    "docs/VERIFICATION.md", "docs/comparison/README.md", "packaging/README.md",
}  # fmt: skip
PAST = {"CHANGELOG.md", "docs/LOG.md", "docs/design/decisions.md"}
# Programs that are not this project's, with what a reader needs for them.
OUTSIDE = {
    "apptainer": "Apptainer",
    "curl": "a network",
    "docker": "Docker",
    "git": "git",
    "hadolint": "a network, pip",
    "hf": "a network, huggingface_hub, an account for gated models",
    "module": "a cluster's modules",
    "openssl": "OpenSSL",
    "pip": "a network",
    "tensorboard": "TensorBoard",
} | dict.fromkeys(("cat", "cd", "diff", "echo", "eval", "export", "sha256sum", "umask"), "a shell")
# Files that a reader brings, beside those in capitals.
YOURS = {"my.toml", "rewards.toml", "hosts.txt", "here.toml", "token"}
FOLDERS = "assets|benches|benchmarks|ci|configs|docs|examples|launch|packaging|slurm|src|tests|tools"
# What starts other programs, with those of its options that take a word of their own.
LAUNCHERS = {"mpirun": ("-n", "--bind-to"), "srun": (), "sbatch": ("-A", "-p")}
# Scripts whose arguments are the program's.
STARTERS = (
    "launch/mpirun.sh", "launch/quickstart.sh",
    "slurm/train_sd35.sh", "slurm/train_glyphs.sh", "slurm/smoke.sh",
)  # fmt: skip

problems = []


def problem(where, what):
    problems.append(f"{where}: {what}")


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


# Links and paths


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@lru_cache(None)
def anchors(document):
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", read(document), re.M)}


def check_links(document, lines):
    for number, line in lines:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = os.path.normpath(os.path.join(os.path.dirname(document), path))
            file = file if path else document
            if not os.path.exists(file):
                problem(f"{document}:{number}", f"the link {target} leads nowhere")
            elif anchor and anchor not in anchors(file):
                problem(f"{document}:{number}", f"{file} has no heading #{anchor}")


def check_mentions():
    """Documents that code, scripts and configurations name."""
    folders = "src tests benches examples launch slurm configs tools".split()
    for path in sorted(p for f in folders for p in glob.glob(f"{f}/**/*", recursive=True)):
        if path.endswith((".rs", ".sh", ".py", ".toml", ".cu", ".h", ".cpp")):
            for name in re.findall(r"(?<![\w/])docs/[\w/.-]*\w", read(path)):
                if not os.path.exists(name):
                    problem(path, f"it names {name}, which is not there")


def check_paths(document, lines):
    for number, line in lines:
        for code in re.findall(r"`([^`]+)`", line):
            is_path = re.fullmatch(rf"({FOLDERS})/[\w./*+-]*", code)
            if is_path and "NEW" not in code and not glob.glob(code):
                problem(f"{document}:{number}", f"there is no {code}")


def check_rooms():
    """The table of docs/README.md has each room of src/, and no other."""
    table = re.findall(r"^\| [a-z ]+ \| (`.*) \|$", read("docs/README.md"), re.M)
    named = set(re.findall(r"`(\w+)`", " ".join(table)))
    rooms = {os.path.basename(path).removesuffix(".rs") for path in glob.glob("src/*")} - {"lib"}
    for room in sorted(rooms ^ named):
        problem("docs/README.md", f"src/ has {room}: {room in rooms}; the table: {room in named}")


# Commands


def is_yours(value):
    """Whether a value is the reader's own: FOLDER, my.toml, /scratch/me, models/a."""
    return value in YOURS or re.search(r"\b[A-Z]{2,}\b|%|^/|^models/|\.jsonl$", value) is not None


class Program:
    """The program's commands and options, as its --help has them."""

    def __init__(self, path):
        self.path = path

    @lru_cache(None)
    def run(self, arguments):
        return subprocess.run([self.path, *arguments], capture_output=True, text=True)

    def help(self, command):
        return self.run((*command, "--help")).stdout

    def commands(self, command):
        listed = re.search(r"^Commands:\n((?:  .*\n)+)", self.help(command), re.M)
        return re.findall(r"^  (\w[\w-]*)", listed.group(1), re.M) if listed else []

    def options(self, command):
        """Option -> "" for a flag, "<" for one with a value, "..." for one with several."""
        found = {}
        row = r"^ +(?:(-\w), )?(--[\w-]+)(?: (<)[^>]*>(\.\.\.)?)?"
        for short, long, value, more in re.findall(row, self.help(command), re.M):
            found[long] = found[short] = more or value
        return found

    def check(self, where, words):
        command = ()
        while words and words[0] in self.commands(command):
            command, words = (*command, words[0]), words[1:]
        name = " ".join(("flowrl-dist", *command))
        usage = r"^Usage:.* <(?!COMMAND)[A-Z_]+>(\.\.\.)?$"
        takes_free = re.search(usage, self.help(command), re.M)
        options, given = self.options(command), []
        words = [word for word in words if word != "..."]
        while words:
            option, joined, value = words[0].partition("=")
            if not option.startswith("-"):
                if not takes_free:
                    problem(where, f"{name} takes no argument {option}")
                words = words[1:]
                continue
            if option not in options:
                problem(where, f"{name} has no option {option}")
                return
            words = words[1:]
            if options[option] and not joined:
                if not words or words[0].startswith("-"):
                    problem(where, f"{name} {option} needs a value")
                    return
                value, words = words[0], words[1:]
            while options[option] == "..." and words and not words[0].startswith("-"):
                words = words[1:]
            given.append((option, value))
        if command in ((), ("train",), ("plan",)):
            self.plan(where, given)

    def plan(self, where, given):
        """A run of which every file is here must have a plan."""
        arguments = []
        for option, value in given:
            if option not in ("--config", "--set", "--ranks", "--machine"):
                continue
            if is_yours(value.partition("=")[2] if option == "--set" else value):
                return
            arguments += [option, value]
        done = self.run(("plan", *arguments))
        if done.returncode != 0:
            problem(where, f"flowrl-dist plan {' '.join(arguments)}: {done.stderr.strip()}")


def check_cargo(where, words):
    """Targets by name, and a test for each filter (one before `--`, any number after)."""
    places = {
        "--test": ("tests/{}.rs", "tests/{}/main.rs"),
        "--bench": ("benches/{}.rs",),
        "--example": ("examples/{}.rs",),
    }
    folders, filters, before = [], [], ""
    for word in words[1:]:
        if before in places:
            if not any(os.path.exists(place.format(word)) for place in places[before]):
                problem(where, f"there is no cargo {before} {word}")
                return
            folders.append(f"tests/{word}" if before == "--test" else None)
        elif word == "--lib":
            folders.append("src")
        elif not word.startswith("-") and before not in ("--features", "--target-dir", "--bin"):
            filters.append(word)
        before = word
    if words[:1] == ["test"] and "..." not in words:
        for name in filters:
            if not any(has_test(folder, name) for folder in folders or ["src", "tests"]):
                problem(where, f"no test's name has {name}")


@lru_cache(None)
def names_of_tests(folder):
    """Names of modules and functions below a folder of Rust."""
    names = set()
    for path in glob.glob(f"{folder}/**/*.rs", recursive=True):
        names.update(path.removesuffix(".rs").split("/"))
        names.update(re.findall(r"\bfn (\w+)", read(path)))
    return names


def has_test(folder, name):
    parts = [part for part in name.split("::") if part]
    return all(any(part in known for known in names_of_tests(folder)) for part in parts)


def without_options(words, with_value):
    while words and words[0].startswith("-"):
        words = words[2 if words[0] in with_value else 1 :]
    return words


def check_words(program, where, words):
    """One command, as the words that a shell makes of it."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    name, rest = words[0], words[1:]
    if name in ("python", "python3"):
        name, rest = (rest or [""])[0], rest[1:]
    script = re.sub(rf"^.*?(?=({FOLDERS})/[\w/.-]+\.(sh|py)$)", "", name)
    if name in LAUNCHERS:
        check_words(program, where, without_options(rest, LAUNCHERS[name]))
    elif os.path.basename(name) == "flowrl-dist":
        program.check(where, rest)
    elif name == "cargo":
        check_cargo(where, rest)
    elif script.endswith((".sh", ".py")):
        if script in STARTERS:
            ranks = 1 if rest and rest[0].isdigit() else 0
            program.check(where, without_options_of_mpirun(rest[ranks:]))
        elif script == "launch/emulate-gpu.sh":
            check_words(program, where, rest)
        elif script == "launch/check-cuda.sh":
            check_cargo(where, rest)
    elif name not in OUTSIDE:
        problem(where, f"{name} is not this project's, and OUTSIDE does not say what it needs")


def without_options_of_mpirun(words):
    """launch/mpirun.sh takes its own options first."""
    while words and words[0] in ("-n", "--hostfile"):
        words = words[2:]
    return words


def check_line(program, where, text):
    """A line of shell, which may hold several commands, also within words: "$(launch/...)"."""
    for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w/.-]+\.(?:sh|py|toml|def)\b", text):
        if not os.path.exists(path):
            problem(where, f"there is no {path}")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        words = list(lexer)
    except ValueError as error:
        problem(where, f"{text}: {error}")
        return
    command = []
    for word in [*words, ";"]:
        if set(word) <= set(";&|()"):
            check_words(program, where, command)
            command = []
        else:
            command.append(word)


def blocks(lines):
    """(number, line) of the code blocks in shell: four spaces, or fences of sh and bash."""
    fence, follows = None, True
    for number, line in lines:
        mark = re.match(r"```(\w*)", line)
        if mark:
            fence = None if fence is not None else mark.group(1)
        elif fence in ("sh", "bash") or (fence is None and follows and line.startswith("    ")):
            yield number, line.strip()
        follows = not line.strip() or (follows and line.startswith("    "))


def check_commands(program, document, lines):
    joined = ""
    for number, line in blocks(lines):
        joined += line.removesuffix("\\")
        if not line.endswith("\\"):
            check_line(program, f"{document}:{number}", joined)
            joined = ""
    in_blocks = {number for number, _ in blocks(lines)}
    prose = "\n".join("" if number in in_blocks else line for number, line in lines)
    starts = r"flowrl-dist|cargo (?:test|bench|build)|mpirun|sbatch|python3|launch/\S+\.sh"
    for code in re.finditer(rf"`((?:\w+=\S+ )?(?:{starts})\s[^`]+)`", prose):
        number = prose.count("\n", 0, code.start()) + 1
        check_line(program, f"{document}:{number}", code.group(1).replace("\n", " "))


# Containers


def check_containers():
    for path in sorted(glob.glob("packaging/*.Dockerfile")):
        stages = re.findall(r"^FROM .* AS (\w+)$", read(path), re.M)
        for source, files in re.findall(r"^COPY (?:--from=(\w+) )?(.*) \S+$", read(path), re.M):
            if source and source not in stages:
                problem(path, f"there is no stage {source}")
            check_copied(path, files.split())
    for path in sorted(glob.glob("packaging/*.def")):
        stages = re.findall(r"^Stage: (\w+)$", read(path), re.M)
        sections = r"^%files(?: from (\w+))?\n((?:    .*\n)+)"
        for source, files in re.findall(sections, read(path), re.M):
            if source and source not in stages:
                problem(path, f"there is no stage {source}")
            check_copied(path, [line.split()[0] for line in files.splitlines()])


def check_copied(path, files):
    """Files of the repository, or of /src, where the build stages have it."""
    for file in files:
        file = file.removeprefix("/src/")
        if not file.startswith("target/") and not os.path.exists(file):
            problem(path, f"it copies {file}, which is not there")


def main():
    if len(sys.argv) != 2 or not os.access(sys.argv[1], os.X_OK):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    program = Program(os.path.abspath(sys.argv[1]))
    os.chdir(ROOT)
    documents = {"*.md", "docs/**/*.md", "packaging/*.md"}
    documents = {d for p in documents for d in glob.glob(p, recursive=True)}
    for document in sorted(COMMANDS - documents):
        problem(document, "is not there")
    for document in sorted(documents):
        lines = list(enumerate(read(document).splitlines(), 1))
        check_links(document, lines)
        if document not in PAST:
            check_paths(document, lines)
        if document in COMMANDS:
            check_commands(program, document, lines)
    check_mentions()
    check_rooms()
    check_containers()
    print(*problems, sep="\n" if problems else "")
    print(f"{len(documents)} documents, {len(problems)} problems")
    return 1 if problems else 0


sys.exit(main())
