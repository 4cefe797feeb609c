"""An honest page store in a folder, and stores that are each wrong in one way. The kit's tests have to tell them apart.

A page is a file with a digest in front; everything is done when a batch is submitted, and told by the next poll.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

from commplane.api import PageStore, StoreDone, StoreUsage
from commplane.errors import CommplaneError

__all__ = ["Honest"]


class Honest(PageStore):
    name = "honest"

    def __init__(self):
        self.ended, self.tickets, self.state = [], 0, "new"

    def known_options(self):
        return {"path", "room"}

    def open(self, context):
        unknown = set(context.options) - self.known_options()
        if unknown or context.page_bytes < 1:
            raise CommplaneError(f"honest: wanted other options, found {sorted(unknown)}, pages of {context.page_bytes} bytes")
        self.nbytes, self.room = context.page_bytes, int(context.options.get("room", 1 << 30))
        self.folder = Path(context.options["path"]) / self.place(context.namespace)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.used = sorted(
            (path.name for path in self.folder.iterdir()), key=lambda name: (self.folder / name).stat().st_mtime_ns
        )
        self.state = "open"

    def place(self, namespace):
        return hashlib.sha256(namespace.encode()).hexdigest()

    def called(self, key):
        return key.hex()

    def submit_exists(self, keys):
        return self.run(keys, None, lambda key, _: self.called(key) in self.used)

    def submit_get(self, keys, pages):
        return self.run(keys, pages, self.get)

    def submit_put(self, keys, pages):
        return self.run(keys, pages, self.put)

    def submit_remove(self, keys):
        return self.run(keys, None, self.remove)

    def run(self, keys, pages, call):
        self.tickets += 1
        ok, error = [False] * len(keys), None
        if self.state != "open" or (pages is not None and len(pages) != len(keys)):
            error = "honest: closed, or more keys than pages"
        else:
            for index, key in enumerate(keys):
                try:
                    page = None if pages is None else pages[index]
                    self.check(key, page, call)
                    ok[index] = bool(call(key, page))
                except ValueError as wrong:
                    error = error or f"honest: {wrong}"
        self.tell(StoreDone(self.tickets, tuple(ok), error))
        return self.tickets

    def tell(self, done):
        self.ended.append(done)

    def check(self, key, page, call):
        if not 1 <= len(key) <= 64:
            raise ValueError(f"a key of {len(key)} bytes")
        if page is not None and (len(page) != self.nbytes or (page.readonly and call == self.get)):
            raise ValueError(f"a page of {len(page)} bytes")

    def touch(self, name):
        if name in self.used:
            self.used.remove(name)
        self.used.append(name)

    def get(self, key, page):
        name = self.called(key)
        if name not in self.used:
            return False
        data = (self.folder / name).read_bytes()
        if not self.is_whole(data):
            self.remove(key, None)
            raise ValueError("damaged")
        page[:] = data[32:]
        self.touch(name)
        return True

    def is_whole(self, data):
        return len(data) == 32 + self.nbytes and hashlib.sha256(data[32:]).digest() == data[:32]

    def put(self, key, page):
        name = self.called(key)
        if name not in self.used:
            while len(self.used) >= self.room:
                self.forget(self.used[0])
            self.write(name, hashlib.sha256(page).digest() + bytes(page))
        self.touch(name)
        return True

    def write(self, name, data):
        unfinished = self.folder / f".{name}"
        unfinished.write_bytes(data)
        unfinished.rename(self.folder / name)

    def forget(self, name):
        self.used.remove(name)
        (self.folder / name).unlink()

    def remove(self, key, _):
        if self.called(key) in self.used:
            self.forget(self.called(key))
        return True

    def poll(self, timeout=0.0):
        out, self.ended = self.ended, []
        return out

    def usage(self):
        return StoreUsage(len(self.used), self.room)

    def close(self):
        self.state = "closed"


class LaterDurable(Honest):
    """Says that a page is stored before it is: it is written at close."""

    def open(self, context):
        super().open(context)
        self.waiting = {}

    def write(self, name, data):
        self.waiting[name] = data

    def get(self, key, page):
        name = self.called(key)
        if name in getattr(self, "waiting", {}):
            page[:] = self.waiting[name][32:]
            return True
        return super().get(key, page)

    def forget(self, name):
        if self.waiting.pop(name, None) is None:
            return super().forget(name)
        self.used.remove(name)
        return None

    def close(self):
        for name, data in getattr(self, "waiting", {}).items():
            super().write(name, data)
        self.waiting = {}
        super().close()


class Torn(Honest):
    """Writes under the last name at once, in pieces, and trusts the size that the file will have."""

    def write(self, name, data):
        with (self.folder / name).open("wb") as file:
            file.truncate(len(data))
            for at in range(0, len(data), 16384):
                file.write(data[at : at + 16384])
                file.flush()
                time.sleep(0.003)  # so that hardly a kill comes between two pages

    def is_whole(self, data):
        return len(data) == 32 + self.nbytes


class Unchecked(Honest):
    def is_whole(self, data):
        return len(data) == 32 + self.nbytes


class KeepsDamage(Honest):
    def get(self, key, page):
        name = self.called(key)
        if name in self.used and not self.is_whole((self.folder / name).read_bytes()):
            raise ValueError("damaged")
        return super().get(key, page)


class OneNamespace(Honest):
    def place(self, namespace):
        return "all"


class ShortKeys(Honest):
    def called(self, key):
        return key[:32].hex()


class NamesInFiles(Honest):
    def called(self, key):
        return repr(key)


class Swaps(Honest):
    def submit_get(self, keys, pages):
        return super().submit_get(keys, [*pages[1:2], *pages[:1], *pages[2:]])


class MissingIsAnError(Honest):
    def get(self, key, page):
        if self.called(key) not in self.used:
            raise ValueError("not there")
        return super().get(key, page)


class OnlyOnce(Honest):
    def put(self, key, page):
        if self.called(key) in self.used:
            return False
        return super().put(key, page)


class KeepsRemoved(Honest):
    def remove(self, key, _):
        return True


class RemovesOnlyWhatIsThere(Honest):
    def remove(self, key, page):
        return self.called(key) in self.used and super().remove(key, page)


class AllOrNothing(Honest):
    def tell(self, done):
        super().tell(StoreDone(done.ticket, (all(done.ok),) * len(done.ok), done.error))


class EndsTwice(Honest):
    def tell(self, done):
        super().tell(done)
        super().tell(done)


class ForgetsEmpty(Honest):
    def tell(self, done):
        if done.ok:
            super().tell(done)


class SameTickets(Honest):
    def poll(self, timeout=0.0):
        out = super().poll(timeout)
        if out:
            self.tickets = 0
        return out


class Raises(Honest):
    def check(self, key, page, call):
        if not 1 <= len(key) <= 64:
            raise KeyError(key)
        super().check(key, page, call)


class AcceptsAnySize(Honest):
    def check(self, key, page, call):
        if not 1 <= len(key) <= 64:
            raise ValueError(key)


class ServesWhenClosed(Honest):
    def close(self):
        pass


class ChangesPages(Honest):
    def put(self, key, page):
        done = super().put(key, page)
        if not page.readonly:
            page[0] ^= 1
        return done

    def check(self, key, page, call):
        super().check(key, page, call)
        if call == self.put and page.readonly:
            raise ValueError("read-only")


class AnyOption(Honest):
    def known_options(self):
        return {"path", "room", "no_such_option"}


class OldestFirst(Honest):
    """A queue, not an order of use."""

    def touch(self, name):
        if name not in self.used:
            self.used.append(name)


class Grows(Honest):
    def usage(self):
        return StoreUsage(len(self.used), min(self.room, 40))

    def open(self, context):
        super().open(context)
        self.room = 1 << 30


class CountsPuts(Honest):
    puts = 0

    def put(self, key, page):
        self.puts += 1
        return super().put(key, page)

    def usage(self):
        return StoreUsage(self.puts, self.room)


class Leaks(Honest):
    def open(self, context):
        super().open(context)
        self.left = os.dup(2)


class LeavesAThread(Honest):
    def open(self, context):
        super().open(context)
        threading.Thread(target=threading.Event().wait, args=(30,), daemon=True).start()


class DropsAtClose(Honest):
    def close(self):
        self.ended = []
        super().close()


class ForgetsAll(Honest):
    def open(self, context):
        super().open(context)
        for name in list(self.used):
            self.forget(name)
