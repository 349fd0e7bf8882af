"Memory of a process, without anything that takes memory."
import threading


def _status(key):
    "MB that the kernel reports for this process."
    for line in open("/proc/self/status"):
        if line.startswith(key): return int(line.split()[1])//1024


def peak_memory():
    """Largest memory of this process so far, MB, with the pages of files that it maps: not
    getrusage, which counts the memory of the process that started this one."""
    return _status("VmHWM")


class OwnMemory:
    """Context that finds the largest `peak` of this process's own memory, MB, without the pages of
    mapped files, which the kernel takes back when it needs them."""
    def __enter__(self):
        self.peak, self._end = _status("RssAnon"), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def _look(self):
        while not self._end.wait(0.01): self.peak = max(self.peak, _status("RssAnon"))

    def __exit__(self, *failure):
        self._end.set()
        self._watch.join()
