"""Spoken digits: recordings out of Debian packages, or synthetic ones where these can't be had."""

import contextlib
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

from ..support.console import SpeechDataError, progress

# Each holds one speaker. The sound packages without -wav (and asterisk-prompt-*) hold GSM, or the same speakers again.
RECORDED_VOICES = {
    "en": "asterisk-core-sounds-en-wav",
    "es": "asterisk-core-sounds-es-wav",
    "fr": "asterisk-core-sounds-fr-wav",
    "it": "asterisk-core-sounds-it-wav",
    "ru": "asterisk-core-sounds-ru-wav",
    "it-menardi": "asterisk-prompt-it-menardi-wav",
}
MIN_VOICES = 4
SYNTHETIC_VOICES = ("en-us+f2", "en-us+f4", "en-us+m3", "en-us+m7", "en+f3", "en+f5", "en+m1", "en+m5")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
UPDATE_SECONDS, DOWNLOAD_SECONDS, PIP_SECONDS = 45, 150, 120


def find_clips(cache):
    """Fetches the clips into `cache`, unless they are there; raises SpeechDataError with all that was tried.

    Returns:
        (str, dict): "recorded" or "synthetic", and the paths of the clips of 0 to 9 per voice.
    """
    reasons = []
    for kind, voices, fetch in (
        ("recorded", RECORDED_VOICES, fetch_recordings),
        ("synthetic", SYNTHETIC_VOICES, synthesise),
    ):
        folder = Path(cache) / kind
        reason = None
        missing = [voice for voice in voices if not (folder / voice).is_dir()]
        if missing:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                fetch(folder, missing)
            except (SpeechDataError, OSError, ImportError, RuntimeError) as error:
                reason = str(error)
        present = [voice for voice in voices if (folder / voice).is_dir()]
        if len(present) >= MIN_VOICES:
            if reason:
                print(f"Going on with {len(present)} of {len(voices)} voices: {reason}")
            return kind, {voice: [folder / voice / f"{digit}.wav" for digit in range(10)] for voice in present}
        print(f"No {kind} digits: {reason}", flush=True)
        reasons.append(f"{kind} digits: {reason}")
    raise SpeechDataError(f"no speech to train on ({'; '.join(reasons)}); give your own recordings with --data DIR")


@contextlib.contextmanager
def _appearing_at_once(folder):
    """A folder to fill, renamed to `folder` at the end: a folder that exists is complete, whatever broke off before."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        clips = Path(part) / "clips"
        clips.mkdir()
        yield clips
        if not folder.exists():
            os.rename(clips, folder)


def fetch_recordings(folder, voices):
    """Downloads Debian packages as an ordinary user, and keeps the ten digits of each."""
    absent = [program for program in ("apt-get", "dpkg") if shutil.which(program) is None]
    if absent:
        raise SpeechDataError(f"{' and '.join(absent)} not found, so this is no Debian or Ubuntu")
    print("Fetching recorded digits: Debian packages, about 120 MB, no root needed", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".apt-") as work:
        work = Path(work)
        for part in ("lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True)
        apt = ["apt-get", "-q", "-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}/cache"]
        apt += ["-o", "Debug::NoLocking=1", "-o", "Acquire::Retries=0"]
        apt += ["-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10"]
        # Its status is of no use: some foreign source may fail, or all of them while it still returns 0.
        _run([*apt, "update"], UPDATE_SECONDS, work, check=False)
        if not any((work / "lists").glob("*_Packages*")):
            raise SpeechDataError("apt-get update fetched no list of packages (is there a network?)")
        give_up_at = time.monotonic() + DOWNLOAD_SECONDS
        failures = []
        for voice in progress(voices, desc="packages"):
            package = RECORDED_VOICES[voice]
            try:
                _run([*apt, "download", package], max(1, give_up_at - time.monotonic()), work)
                archive = next(work.glob(f"{package}_*.deb"))
                _run(["dpkg", "-x", archive.name, package], 60, work)
                _keep_digits(work / package, folder / voice)
            except SpeechDataError as error:
                failures.append(f"{package}: {error}")
    if failures:
        raise SpeechDataError(failures[0] if len(failures) == 1 else f"{failures[0]} (and {len(failures) - 1} more)")


def _keep_digits(package_folder, folder):
    digits = next(package_folder.glob("usr/share/asterisk/sounds/*/digits"), package_folder)
    with _appearing_at_once(folder) as clips:
        for digit in range(10):
            if not (digits / f"{digit}.wav").is_file():
                raise SpeechDataError(f"holds no digits/{digit}.wav")
            shutil.copy(digits / f"{digit}.wav", clips)


def _run(command, seconds, folder, check=True):
    program = Path(command[0]).name
    try:
        done = subprocess.run(command, cwd=folder, timeout=seconds, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        raise SpeechDataError(f"{program} did not finish in {seconds:.0f} s") from None
    if check and done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise SpeechDataError(f"{program}: {said[-1].strip() if said else f'status {done.returncode}'}")


def synthesise(folder, voices):
    """Speaks the digits with espeak-ng, of the wheel espeakng-loader (fetched beside the clips if it is missing)."""
    packages = str(folder.resolve().parent / "packages")  # not into the environment, which is not ours
    sys.path.append(packages)
    try:
        import espeakng_loader
    except ImportError:
        print("Fetching espeakng-loader (synthetic speech)", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--retries", "1", "--target", packages]
        _run([*pip, "espeakng-loader"], PIP_SECONDS, folder)
        importlib.invalidate_caches()
        import espeakng_loader
    finally:
        sys.path.remove(packages)

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    synchronous, dont_exit, utf8, by_character = 2, 0x8000, 1, 1
    pieces = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    with tempfile.TemporaryDirectory() as short:
        # espeak-ng keeps its path in 160 bytes, which a virtual environment's may exceed.
        os.symlink(espeakng_loader.get_data_path(), Path(short) / "espeak-ng-data")
        rate = espeak.espeak_Initialize(synchronous, 0, short.encode(), dont_exit)
        if rate <= 0:
            raise SpeechDataError("espeak-ng does not start")
        espeak.espeak_SetSynthCallback(collect)
        for voice in voices:
            if espeak.espeak_SetVoiceByName(voice.encode()) != 0:
                raise SpeechDataError(f"espeak-ng has no voice {voice}")
            with _appearing_at_once(folder / voice) as clips:
                for digit, word in enumerate(DIGITS):
                    pieces.clear()
                    text = word.encode() + b"\0"
                    espeak.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, by_character, 0, utf8, None, None)
                    espeak.espeak_Synchronize()
                    with wave.open(str(clips / f"{digit}.wav"), "wb") as out:
                        out.setparams((1, 2, rate, 0, "NONE", ""))
                        out.writeframes(b"".join(pieces))
        espeak.espeak_Terminate()
