"use strict";
// The state of a review, without a page: offsets count code points, as Python does.
class Review {
  constructor(documents) {
    this.documents = documents.map((each) => ({
      characters: Array.from(each.text),
      reviewed: false,
      spans: each.spans.map((span) => ({ ...span, state: "found" })),
    }));
    this.history = [];
  }

  change(index, make) {
    const one = this.documents[index];
    this.history.push([index, one.spans, one.reviewed]);
    one.spans = make(one.spans).sort((a, b) => a.start - b.start);
  }

  // A found mark is taken for a false alarm, or no longer; an added one goes.
  toggle(index, start) {
    this.change(index, (spans) => spans.flatMap((span) => {
      if (span.start !== start) return [span];
      if (span.state === "added") return [];
      return [{ ...span, state: span.state === "found" ? "removed" : "found" }];
    }));
  }

  // Marks what was missed; marks that it touches go under.
  add(index, start, end, label) {
    const characters = this.documents[index].characters;
    while (start < end && /\s/u.test(characters[start])) start += 1;
    while (start < end && /\s/u.test(characters[end - 1])) end -= 1;
    if (start >= end) return false;
    this.change(index, (spans) => [...spans.filter((span) => span.end <= start || end <= span.start), { start, end, label, state: "added" }]);
    return true;
  }

  // The word at a place, as [start, end]; empty where there is none.
  word(index, at) {
    const characters = this.documents[index].characters;
    const inside = (place) => place >= 0 && place < characters.length && /[\p{L}\p{N}\p{M}'’_-]/u.test(characters[place]);
    let [start, end] = [at, at];
    while (inside(start - 1)) start -= 1;
    while (inside(end)) end += 1;
    return [start, end];
  }

  review(index, reviewed) {
    const one = this.documents[index];
    this.history.push([index, one.spans, one.reviewed]);
    one.reviewed = reviewed;
  }

  undo() {
    const last = this.history.pop();
    if (last === undefined) return -1;
    const [index, spans, reviewed] = last;
    Object.assign(this.documents[index], { spans, reviewed });
    return index;
  }

  tally() {
    const all = this.documents.flatMap((one) => one.spans);
    const count = (state) => all.filter((span) => span.state === state).length;
    return {
      reviewed: this.documents.filter((one) => one.reviewed).length,
      documents: this.documents.length,
      found: count("found"), added: count("added"), removed: count("removed"),
    };
  }

  // Samples for `discreet redact calibrate`, one a line: only reviewed texts, with the marks that stand.
  lines() {
    return this.documents.filter((one) => one.reviewed).map((one) => JSON.stringify({
      text: one.characters.join(""),
      spans: one.spans.filter((span) => span.state !== "removed").map(({ start, end, label }) => ({ start, end, label })),
    }) + "\n").join("");
  }
}

function hue(label, labels) {
  return Math.round(labels.indexOf(label) * 137.5) % 360; // the golden angle keeps neighbours in the list apart
}

function show(data) {
  const review = new Review(data.documents);
  const select = document.getElementById("label");
  for (const label of data.labels) select.add(new Option(label, label));
  const home = document.getElementById("documents");
  let saved = true;

  const draw = (index) => {
    const one = review.documents[index];
    const article = home.children[index];
    article.className = one.reviewed ? "done" : "";
    article.querySelector("input").checked = one.reviewed;
    const place = article.querySelector(".text");
    const pieces = [];
    let at = 0;
    const plain = (start, end) => {
      if (start >= end) return;
      const piece = document.createElement("span");
      piece.dataset.start = start;
      piece.textContent = one.characters.slice(start, end).join("");
      pieces.push(piece);
    };
    for (const span of one.spans) {
      plain(at, span.start);
      const mark = document.createElement("mark");
      mark.textContent = one.characters.slice(span.start, span.end).join("");
      mark.dataset.start = span.start;
      mark.dataset.label = span.label;
      mark.className = span.state;
      mark.tabIndex = 0;
      mark.setAttribute("role", "button");
      mark.setAttribute("aria-label", `${span.label}, ${span.state}`);
      mark.style.setProperty("--hue", hue(span.label, data.labels));
      pieces.push(mark);
      at = span.end;
    }
    plain(at, one.characters.length);
    place.replaceChildren(...pieces);
    const now = review.tally();
    document.getElementById("tally").textContent =
      `${now.reviewed} of ${now.documents} texts ticked · ${now.found} found · ${now.added} missed · ${now.removed} false alarms`;
  };

  // The code point at which a selection begins or ends.
  const offset = (node, within) => {
    const piece = (node.nodeType === Node.TEXT_NODE ? node.parentElement : node).closest("[data-start]");
    if (piece === null) return null;
    const before = node.nodeType === Node.TEXT_NODE ? node.data.slice(0, within) : within > 0 ? piece.textContent : "";
    return Number(piece.dataset.start) + Array.from(before).length;
  };

  const changed = (index) => { saved = false; draw(index); };

  review.documents.forEach((one, index) => {
    const article = document.createElement("article");
    const bar = document.createElement("div");
    bar.className = "bar";
    const name = document.createElement("span");
    name.textContent = `Text ${index + 1}`;
    const label = document.createElement("label");
    const tick = document.createElement("input");
    tick.type = "checkbox";
    tick.addEventListener("change", () => { review.review(index, tick.checked); changed(index); });
    label.append(tick, " all right");
    bar.append(name, label);
    const text = document.createElement("div");
    text.className = "text";
    text.addEventListener("click", (event) => {
      const selection = window.getSelection();
      const mark = event.target.closest("mark");
      if (selection.isCollapsed) {
        if (mark !== null) {
          review.toggle(index, Number(mark.dataset.start));
        } else {
          const at = selection.anchorNode === null || !text.contains(selection.anchorNode) ? null : offset(selection.anchorNode, selection.anchorOffset);
          if (at === null || !review.add(index, ...review.word(index, at), select.value)) return;
        }
      } else {
        const range = selection.getRangeAt(0);
        if (!text.contains(range.startContainer) || !text.contains(range.endContainer)) return;
        const [start, end] = [offset(range.startContainer, range.startOffset), offset(range.endContainer, range.endOffset)];
        if (start === null || end === null || !review.add(index, start, end, select.value)) return;
        selection.removeAllRanges();
      }
      changed(index);
    });
    text.addEventListener("keydown", (event) => {
      const mark = event.target.closest("mark");
      if (mark === null || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      const start = mark.dataset.start;
      review.toggle(index, Number(start));
      changed(index);
      text.querySelector(`[data-start="${start}"]`)?.focus();
    });
    article.append(bar, text);
    home.append(article);
    draw(index);
  });

  document.getElementById("undo").addEventListener("click", () => {
    const index = review.undo();
    if (index >= 0) changed(index);
  });
  document.getElementById("export").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([review.lines()], { type: "application/jsonl" }));
    link.download = "labels.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
    saved = true;
  });
  window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
  return review;
}

if (typeof document !== "undefined") window.review = show(JSON.parse(document.getElementById("data").textContent));
