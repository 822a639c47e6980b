"use strict";
// The page's script: its language, sortable tables, and the samples, which are built as they are scrolled to.
// page_data.py says what `data` holds; words.yaml has its words. Whatever a model or a dataset wrote is put in as text
// (textContent), never as HTML.

const CHUNK = 12;
const DISAGREEMENT = { judge: 3, rouge: 0.3 };  // points of 10; ROUGE-1
const REGRESSION = { judge: 1, rouge: 0.1 };
const REPETITION = 0.1;  // share of repeated 4-grams

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = id => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
let language = parameters.get("lang") || (navigator.language.startsWith("ko") ? "ko" : "en");
let words = data.words[language] || data.words.en;
if (parameters.get("theme")) root.dataset.theme = parameters.get("theme");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- Language and theme

function speak() {
  words = data.words[language];
  root.lang = language;
  document.querySelectorAll("[data-word]").forEach(node => { node.textContent = words[node.dataset.word]; });
  document.querySelectorAll("[data-title]").forEach(node => {
    const title = node.dataset.title;
    node.textContent = Object.hasOwn(words.titles, title) ? words.titles[title] : title;
  });
  document.querySelectorAll("[data-lang]").forEach(node => { node.hidden = node.dataset.lang !== language; });
  search.placeholder = words.search;
  search.setAttribute("aria-label", words.search);
}

byId("language").addEventListener("click", () => {
  language = language === "en" ? "ko" : "en";
  speak();
  show();
});
byId("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// --- Tables

document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, column = [...head.parentElement.children].indexOf(head);
  const direction = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  head.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const body = head.closest("table").tBodies[0];
  const value = row => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent;
    return cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value);
  };
  [...body.rows]
    .sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (typeof left === "number") return direction * (left - right || 0);
      return direction * left.localeCompare(right, undefined, { numeric: true });
    })
    .forEach(row => body.append(row));
}));

// --- Which samples

const search = byId("search"), filter = byId("filter"), ofModel = byId("of-model"), order = byId("order");
const texts = [];  // of each sample, lower case, made when first searched
const scale = data.judged ? "judge" : "rouge";
const hidden = new Set();  // models that are not shown
let waiting;  // for the next key of a search
let start = 0, listed = [], rendered = 0, differences = false;

const boxes = data.models.map((name, i) => {
  ofModel.append(new Option(name, i));
  const label = element("label", "model"), box = element("input");
  box.type = "checkbox";
  box.checked = true;
  box.addEventListener("change", hideUnchecked);
  label.append(box, " " + name);
  byId("models").append(label);
  return box;
});

function hideUnchecked() {
  hidden.clear();
  boxes.forEach((box, i) => { if (!box.checked) hidden.add(i); });
  show();
}

[["all-models", true], ["no-models", false]].forEach(([id, checked]) => byId(id).addEventListener("click", () => {
  boxes.forEach(box => { box.checked = checked; });
  hideUnchecked();
}));

function textOf(i) {
  if (texts[i] === undefined) {
    const sample = data.samples[i];
    const parts = [sample.id, ...sample.messages.map(message => message.content), ...sample.references];
    sample.answers.filter(answer => answer).forEach(answer => {
      parts.push(answer.prediction || "", answer.error || "", ...answer.judgements.map(judged => judged.explanation));
    });
    sample.preferences.forEach(preference => parts.push(...preference.replies.map(reply => reply.explanation)));
    texts[i] = parts.join("\n").toLowerCase();
  }
  return texts[i];
}

const scoreOf = answer => (answer ? (data.judged ? answer.overall : answer.rouge1) : null);  // null where there is none

function spread(sample) {
  const scores = sample.answers.map(scoreOf).filter(score => score !== null);
  return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : 0;
}

// How much higher the first answer's score is; NaN, which no comparison is true of, where one of them has none.
function differenceOf(first, second) {
  const [left, right] = [scoreOf(first), scoreOf(second)];
  return left === null || right === null ? NaN : left - right;
}

const TESTS = {  // whether answer i of a sample is what is looked for
  disagreement: (sample, i) => sample.answers.some(other =>
    Math.abs(differenceOf(other, sample.answers[i])) >= DISAGREEMENT[scale]),
  regression: (sample, i) => data.successors.some(([before, after]) => after === i &&
    differenceOf(sample.answers[before], sample.answers[after]) >= REGRESSION[scale]),
  unstopped: (sample, i) => Boolean(sample.answers[i]) && sample.answers[i].finish_reason === "length",
  repeated: (sample, i) => Boolean(sample.answers[i]) && sample.answers[i].seq_rep_4 >= REPETITION,
  failed: (sample, i) => Boolean(sample.answers[i]) && ![null, "ok"].includes(sample.answers[i].status),
  // a preference for one of two answers, of which the other has the higher score
  against: (sample, i) => sample.preferences.some(({ pair, outcome }) => {
    const { first, second } = data.pairs[pair];
    const difference = differenceOf(sample.answers[first], sample.answers[second]);
    const isAgainst = outcome === "first" ? difference < 0 : outcome === "second" && difference > 0;
    return (i === first || i === second) && isAgainst;
  }),
  missing: (sample, i) => !sample.answers[i] || sample.answers[i].finish_reason === "error",
};

function find() {
  const wanted = search.value.trim().toLowerCase(), test = TESTS[filter.value];
  const models = ofModel.value === "" ? data.models.map((_, i) => i) : [Number(ofModel.value)];
  listed = [];
  data.samples.forEach((sample, i) => {
    if (wanted && !textOf(i).includes(wanted)) return;
    if (test && !models.some(model => test(sample, model))) return;
    listed.push(i);
  });
  const lowest = sample => Math.min(...models.map(i => scoreOf(sample.answers[i]) ?? Infinity));
  const keys = { disagreement: sample => -spread(sample), score: lowest };
  if (keys[order.value]) {
    const key = new Map(listed.map(i => [i, keys[order.value](data.samples[i])]));
    listed.sort((a, b) => key.get(a) - key.get(b) || a - b);
  }
}

// --- Samples

function words_of(text) {
  return text.match(/\s+|[^\s]+/g) || [];
}

const plain = word => word.toLowerCase().replace(/^[^\p{L}\p{N}#]+|[^\p{L}\p{N}#]+$/gu, "");

// Longest common subsequence of the words of a reference and an answer; words that both have are plain text.
function differenceNodes(reference, answer) {
  const old = words_of(reference).filter(word => word.trim()), now = words_of(answer).filter(word => word.trim());
  if (old.length * now.length > 1e6) return [document.createTextNode(answer)];
  const width = now.length + 1, table = new Uint16Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      table[i * width + j] = plain(old[i]) === plain(now[j]) ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const nodes = [];
  let i = 0, j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && plain(old[i]) === plain(now[j])) {
      nodes.push(document.createTextNode(now[j] + " "));
      i++; j++;
    } else if (j < now.length && (i === old.length || table[i * width + j + 1] >= table[(i + 1) * width + j])) {
      nodes.push(element("ins", "", now[j++]), " ");
    } else {
      nodes.push(element("del", "", old[i++]), " ");
    }
  }
  return nodes;
}

function answerCard(sample, answer, i) {
  const card = element("div", "answer"), head = element("h4"), name = element("span", "", data.models[i]);
  head.append(name);
  card.append(head);
  if (!answer || answer.finish_reason === "error") {
    card.append(element("div", "bad small", (answer && answer.error) || words.noAnswer));
    return card;
  }
  if (answer.overall !== null) head.append(element("span", "score", answer.overall.toFixed(1) + " / 10"));
  const text = element("div", "text"), [reference] = sample.references;
  if (!answer.prediction) text.append(words.empty);
  else if (differences && reference !== undefined) text.append(...differenceNodes(reference, answer.prediction));
  else text.textContent = answer.prediction;
  card.append(text);
  const facts = element("div", "small soft");
  if (answer.rouge1 !== null) facts.append(`ROUGE-1 ${answer.rouge1.toFixed(2)} · `);
  const stopped = answer.finish_reason === "stop";
  facts.append(element("span", stopped ? "good" : "bad", stopped ? words.stopped : words.cutOff));
  if (answer.num_new_tokens !== null) facts.append(` ${words.after} ${answer.num_new_tokens} ${words.tokens}`);
  if (answer.seq_rep_4 > 0) facts.append(` · ${words.repeats} ${Math.round(100 * answer.seq_rep_4)} %`);
  card.append(facts);
  if (![null, "ok"].includes(answer.status)) {
    card.append(element("div", "bad small", `${words.noJudgement} ${answer.status}`));
  }
  if (answer.judgements.length) {
    const details = element("details"), list = element("dl");
    details.append(element("summary", "", words.judge), list);
    answer.judgements.forEach(({ score, explanation }, k) => {
      list.append(element("dt", "", `${data.criteria[k]}: ${score}`), element("dd", "", explanation));
    });
    card.append(details);
  }
  if (answer.people.length) {
    const given = answer.people.map(({ measure, score }) => `${measure} ${score}`).join(", ");
    card.append(element("div", "small", `${words.people}: ${given}`));
  }
  return card;
}

function preferenceOf({ pair, outcome, replies }) {
  const { first, second, judge } = data.pairs[pair], names = { first: data.models[first], second: data.models[second] };
  const details = element("details"), list = element("dl");
  const loser = outcome === "first" ? names.second : names.first;
  const result = outcome === "tie" ? `${words.isEqual} ${names.first} ${words.and} ${names.second}`
    : `${names[outcome]} ${words.isPreferred} ${loser}`;
  details.append(element("summary", "", `${words.sideBySide}: ${result}`), list);
  replies.forEach(({ preferred, explanation }) => {
    const head = preferred === "tie" ? `${judge}: ${words.tie}` : `${judge} ${words.prefers} ${names[preferred]}`;
    list.append(element("dt", "", head), element("dd", "", explanation));
  });
  return details;
}

function sampleCard(i) {
  const sample = data.samples[i], card = element("article", "card");
  card.id = "s-" + sample.id;
  card.tabIndex = -1;
  const left = element("div"), link = element("a", "small", sample.id);
  link.href = "#s=" + encodeURIComponent(sample.id);
  left.append(link);
  sample.messages.forEach(({ role, content }) => {
    const message = element("div", "message");
    message.append(element("div", "role", role), element("div", "text", content));
    left.append(message);
  });
  sample.preferences.forEach(preference => left.append(preferenceOf(preference)));
  const answers = element("div", "answers"), reference = element("div", "answer reference");
  reference.append(element("h4", "", sample.references.length > 1 ? words.references : words.reference));
  sample.references.forEach(text => reference.append(element("div", "text message", text)));
  answers.append(reference);
  sample.answers.forEach((answer, k) => { if (!hidden.has(k)) answers.append(answerCard(sample, answer, k)); });
  const both = element("div", "sample");
  both.append(left, answers);
  card.append(both);
  return card;
}

const list = byId("list"), end = byId("end");

function more() {
  const fragment = document.createDocumentFragment();
  listed.slice(start + rendered, start + rendered + CHUNK).forEach(i => fragment.append(sampleCard(i)));
  rendered = Math.min(rendered + CHUNK, listed.length - start);
  list.append(fragment);
}

function show(from = 0) {
  find();
  start = from;
  rendered = 0;
  list.replaceChildren();
  more();
  byId("count").textContent = `${listed.length} ${words.of} ${data.samples.length} ${words.shown}`;
  byId("from-start").hidden = start === 0;
  byId("legend").hidden = !differences;
}

function follow() {
  const match = /^#s=(.*)$/.exec(location.hash);
  if (!match) {
    const fold = byId(location.hash.slice(1));
    if (fold && fold.tagName === "DETAILS") fold.open = true;
    return;
  }
  const id = decodeURIComponent(match[1]);
  const index = data.samples.findIndex(sample => sample.id === id);
  if (index < 0) {
    byId("count").textContent = `${words.notFound} ${id}`;
    return;
  }
  clearTimeout(waiting);  // of a search that was just typed
  find();
  if (!listed.includes(index)) {
    search.value = filter.value = ofModel.value = "";
    find();
  }
  show(listed.indexOf(index));
  const card = byId("s-" + id);
  card.classList.add("linked");
  card.scrollIntoView();
  card.focus({ preventScroll: true });
}

new IntersectionObserver(entries => {
  if (entries.some(entry => entry.isIntersecting) && start + rendered < listed.length) more();
}, { rootMargin: "1200px" }).observe(end);

search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(show, 120);
});
[filter, ofModel, order].forEach(control => control.addEventListener("change", () => show()));
byId("from-start").addEventListener("click", () => {
  history.replaceState(null, "", location.pathname + location.search);
  show();
});
function toggleDifferences() {
  differences = !differences;
  byId("differences").setAttribute("aria-pressed", differences);
  show(start);
}
byId("differences").addEventListener("click", toggleDifferences);
addEventListener("hashchange", follow);

function step(direction) {
  const cards = [...list.children];
  const current = cards.indexOf(document.activeElement.closest ? document.activeElement.closest("article") : null);
  if (current === cards.length - 1 && start + rendered < listed.length) more();
  const next = list.children[current < 0 ? 0 : Math.max(0, current + direction)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView();
  }
}

addEventListener("keydown", event => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
  if (event.key === "Escape") {
    search.value = "";
    search.blur();
    show();
  } else if (typing || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  } else if (event.key === "/") {
    search.focus();
    event.preventDefault();
  } else if (event.key === "j" || event.key === "k") {
    step(event.key === "j" ? 1 : -1);
  } else if (event.key === "d") {
    toggleDifferences();
  }
});

if (!data.words[language]) language = "en";
speak();
show();
follow();
