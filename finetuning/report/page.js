"use strict";
// The page's script: words in two languages, sortable tables, and the samples, which are built as they are scrolled to.
// Whatever a model or a dataset wrote is put in as text (textContent), never as HTML.

const WORDS = {
  en: {
    details: "The verdict in full", table: "Scores", comparisons: "Comparisons", opinions: "Judges and people", plots: "Plots",
    samples: "Samples, side by side",
    preflight: "Before training: what was learned from", how: "How this was made",
    search: "Search dialogues, references and answers (press /)", all: "all samples",
    disagreement: "models disagree", regression: "worse than the checkpoint before", unstopped: "answer did not stop",
    repeated: "answer repeats itself", failed: "judgement failed", missing: "answer is missing", any: "any model",
    order: "in their order", byDisagreement: "largest disagreement first", byScore: "lowest score first",
    differences: "differences to the reference (d)", theme: "light / dark", language: "한국어", reference: "reference",
    references: "references", stopped: "stopped", cutOff: "cut off", after: "after", tokens: "tokens", repeats: "repeats",
    noAnswer: "not answered", empty: "(empty)", noJudgement: "no judgement:", judge: "judge", of: "of", shown: "samples",
    fromStart: "show all samples", notFound: "there is no sample", shownModels: "models that are shown", allModels: "all",
    noModels: "none", against: "side by side against the scores", people: "people", sideBySide: "side by side",
    isPreferred: "is preferred to", isEqual: "no preference that holds in both orders between", and: "and", prefers: "prefers",
    tie: "a tie",
    keys: "Keys: / search · j and k next and previous sample · d differences · Esc clear",
    legend: "Underlined: not in the reference. Struck through: only in the reference.",
    tableNote: "Means over samples with their 95 % interval (BCa bootstrap; Wilson for the share that stopped). Stopped: share of " +
      "the answers that ended with an end token. seq-rep-4: share of the 4-grams of an answer that it had before. What has no " +
      "score counts in no mean. Click a title to sort.",
    comparisonNote: "The first model minus the second on the same samples, with the 95 % interval; p of approximate " +
      "randomisation, adjusted for all comparisons (Holm). Detectable: the smallest difference that so many samples show with a " +
      "probability of 80 %.",
    "pairs-tableNote": "Each sample is one vote: an answer is preferred where the judge prefers it in both orders, all else is a " +
      "tie. Share: of the preferred among those with a preference, with its 95 % interval (Wilson); p of the sign test, adjusted " +
      "for all pairs (Holm). Flips: ties in which the other answer was preferred once the order changed. First place: preferences " +
      "for the answer that stood first, of all preferences.",
    "jury-tableNote": "Means over the answers that every judge of the jury has scored. Their mean is what models are ranked by. Spread: " +
      "standard deviation of an answer's scores between the judges. Alpha: Krippendorff's, within the model; 1 is full agreement, 0 " +
      "is chance.",
    "people-tableNote": "Means over the answers that people have scored, and of the judge over the same. Spearman and kappa (quadratic " +
      "weights) say how far the judge agrees with people, with their 95 % intervals.",
  },
  ko: {
    details: "판정 전문", table: "점수", comparisons: "비교", opinions: "심사 모델과 사람", plots: "그림", samples: "샘플 나란히 보기",
    preflight: "훈련 전: 무엇을 학습했는가", how: "만든 방법",
    search: "대화, 정답, 답변 검색 (/ 키)", all: "모든 샘플",
    disagreement: "모델끼리 다름", regression: "앞 체크포인트보다 나빠짐", unstopped: "멈추지 않은 답변",
    repeated: "반복하는 답변", failed: "심사 실패", missing: "답변 없음", any: "모든 모델",
    order: "원래 순서", byDisagreement: "차이가 큰 순서", byScore: "점수가 낮은 순서",
    differences: "정답과의 차이 (d)", theme: "밝게 / 어둡게", language: "English", reference: "정답",
    references: "정답", stopped: "멈춤", cutOff: "잘림", after: "·", tokens: "토큰", repeats: "반복",
    noAnswer: "답변 없음", empty: "(빈 답변)", noJudgement: "심사 없음:", judge: "심사", of: "/", shown: "개 샘플",
    fromStart: "모든 샘플 보기", notFound: "그런 샘플이 없습니다:", shownModels: "보이는 모델", allModels: "모두", noModels: "없음",
    against: "나란히 견준 결과가 점수와 다름", people: "사람", sideBySide: "나란히 견줌", isPreferred: ">",
    isEqual: "두 순서 모두에서 같은 선호가 없음:", and: "·", prefers: "선호:", tie: "무승부",
    keys: "키: / 검색 · j, k 다음·이전 샘플 · d 차이 · Esc 지우기",
    legend: "밑줄: 정답에 없는 말. 취소선: 정답에만 있는 말.",
    tableNote: "샘플 평균과 95 % 구간입니다 (BCa 부트스트랩, 멈춘 비율은 Wilson). 멈춤: 종료 토큰으로 끝난 답변의 비율. seq-rep-4: 답변 " +
      "안에서 앞에 이미 나온 4-gram의 비율. 점수가 없는 것은 평균에 들지 않습니다. 제목을 누르면 정렬됩니다.",
    "title:model": "모델", "title:samples": "샘플", "title:errors": "오류", "title:judged": "심사됨", "title:failed": "실패",
    "title:coverage": "심사 비율", "title:judge overall": "종합 점수", "title:stopped": "멈춤", "title:length ratio": "길이 비",
    "title:tokens": "토큰", "title:seconds": "초", "title:cost": "비용", "title:minus": "빼기", "title:difference": "차이",
    "title:better": "나음", "title:equal": "같음", "title:worse": "못함", "title:detectable": "검출 가능",
    comparisonNote: "같은 샘플에서 앞 모델에서 뒤 모델을 뺀 값과 95 % 구간입니다. p는 근사 무작위화 검정의 것이며 모든 비교에 대해 " +
      "보정했습니다 (Holm). 검출 가능: 이만한 샘플로 80 % 확률로 볼 수 있는 가장 작은 차이.",
    "title:against": "상대", "title:judge": "심사 모델", "title:preferred": "선호됨", "title:tie": "무승부",
    "title:not preferred": "상대 선호", "title:share": "비율", "title:flips": "뒤바뀜", "title:first place": "앞자리",
    "title:answers": "답변", "title:mean": "평균", "title:spread of the judges": "심사 모델 간 편차", "title:measure": "항목",
    "title:scores": "점수 수", "title:mean of people": "사람 평균", "title:mean of the judge": "심사 모델 평균",
    "pairs-tableNote": "샘플 하나가 한 표입니다. 두 순서 모두에서 선호된 답변만 선호로 세고 나머지는 무승부입니다. 비율: 우열이 가려진 것 중 " +
      "선호된 비율과 95 % 구간(Wilson). p는 부호 검정의 것이며 모든 쌍에 대해 보정했습니다 (Holm). 뒤바뀜: 순서를 바꾸자 다른 답변이 선호된 " +
      "무승부. 앞자리: 모든 선호 중 앞에 놓인 답변이 선호된 비율.",
    "jury-tableNote": "모든 심사 모델이 점수를 매긴 답변의 평균입니다. 순위는 이들의 평균으로 매깁니다. 편차: 한 답변에 대한 심사 모델 간 " +
      "표준편차. alpha: 한 모델의 답변에 대한 Krippendorff의 alpha. 1이면 완전 일치, 0이면 우연입니다.",
    "people-tableNote": "사람이 점수를 매긴 답변의 평균과, 같은 답변에 대한 심사 모델의 평균입니다. Spearman과 kappa(제곱 가중)는 심사 " +
      "모델이 사람과 얼마나 일치하는지를 95 % 구간과 함께 나타냅니다.",
  },
};
const CHUNK = 12;
const DISAGREEMENT = { judge: 3, rouge: 0.3 };  // points of 10; ROUGE-1
const REGRESSION = { judge: 1, rouge: 0.1 };
const REPETITION = 0.1;  // share of repeated 4-grams

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = id => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
let language = parameters.get("lang") || (navigator.language.startsWith("ko") ? "ko" : "en");
let words = WORDS[language] || WORDS.en;
if (parameters.get("theme")) root.dataset.theme = parameters.get("theme");

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// --- Language and theme

function speak() {
  words = WORDS[language];
  root.lang = language;
  document.querySelectorAll("[data-word]").forEach(node => {
    if (node.dataset.original === undefined) node.dataset.original = node.textContent;
    const word = words[node.dataset.word];  // a term that is used as it is has none
    node.textContent = word === undefined ? node.dataset.original : word;
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
    return "value" in cell.dataset ? (cell.dataset.value === "" ? -Infinity : Number(cell.dataset.value)) : cell.textContent;
  };
  [...body.rows]
    .sort((a, b) => {
      const [left, right] = [value(a), value(b)];
      return direction * (typeof left === "number" ? left - right || 0 : left.localeCompare(right, undefined, { numeric: true }));
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
    const parts = [sample.id, ...sample.m.map(message => message[1]), ...sample.r];
    sample.a.forEach(answer => { if (answer) parts.push(answer.p || "", answer.e || "", ...(answer.v || []).map(v => v[1])); });
    (sample.w || []).forEach(([, , replies]) => parts.push(...replies.map(reply => reply[1])));
    texts[i] = parts.join("\n").toLowerCase();
  }
  return texts[i];
}

const scoreOf = answer => (answer ? (data.judged ? answer.o : answer.g) : undefined);

function spread(sample) {
  const scores = sample.a.map(scoreOf).filter(score => score !== undefined);
  return scores.length > 1 ? Math.max(...scores) - Math.min(...scores) : 0;
}

const TESTS = {  // whether answer i of a sample is what is looked for
  disagreement: (sample, i) => scoreOf(sample.a[i]) !== undefined &&
    sample.a.some(other => scoreOf(other) !== undefined && Math.abs(scoreOf(other) - scoreOf(sample.a[i])) >= DISAGREEMENT[scale]),
  regression: (sample, i) => data.successors.some(([before, after]) => after === i &&
    scoreOf(sample.a[before]) !== undefined && scoreOf(sample.a[after]) !== undefined &&
    scoreOf(sample.a[before]) - scoreOf(sample.a[after]) >= REGRESSION[scale]),
  unstopped: (sample, i) => Boolean(sample.a[i]) && sample.a[i].f === "length",
  repeated: (sample, i) => Boolean(sample.a[i]) && sample.a[i].q >= REPETITION,
  failed: (sample, i) => Boolean(sample.a[i]) && sample.a[i].s !== undefined && sample.a[i].s !== "ok",
  // a preference for one of two answers, of which the other has the higher score
  against: (sample, i) => (sample.w || []).some(([number, outcome]) => {
    const [first, second] = data.pairs[number], difference = scoreOf(sample.a[first]) - scoreOf(sample.a[second]);
    return (i === first || i === second) && (outcome === "first" ? difference < 0 : outcome === "second" && difference > 0);
  }),
  missing: (sample, i) => !sample.a[i] || sample.a[i].f === "error",
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
  const lowest = sample => Math.min(...models.map(i => scoreOf(sample.a[i])).map(score => (score === undefined ? Infinity : score)));
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
  if (!answer || answer.f === "error") {
    card.append(element("div", "bad small", answer ? answer.e || words.noAnswer : words.noAnswer));
    return card;
  }
  if (answer.o !== undefined) head.append(element("span", "score", answer.o.toFixed(1) + " / 10"));
  const text = element("div", "text");
  if (!answer.p) text.append(words.empty);
  else if (differences && sample.r.length) text.append(...differenceNodes(sample.r[0], answer.p));
  else text.textContent = answer.p;
  card.append(text);
  const facts = element("div", "small soft");
  if (answer.g !== undefined) facts.append(`ROUGE-1 ${answer.g.toFixed(2)} · `);
  const stopped = answer.f === "stop";
  facts.append(element("span", stopped ? "good" : "bad", stopped ? words.stopped : words.cutOff));
  if (answer.n !== undefined) facts.append(` ${words.after} ${answer.n} ${words.tokens}`);
  if (answer.q > 0) facts.append(` · ${words.repeats} ${Math.round(100 * answer.q)} %`);
  card.append(facts);
  if (answer.s !== undefined && answer.s !== "ok") card.append(element("div", "bad small", `${words.noJudgement} ${answer.s}`));
  if (answer.v) {
    const details = element("details"), list = element("dl");
    details.append(element("summary", "", words.judge), list);
    answer.v.forEach(([score, explanation], k) => {
      list.append(element("dt", "", `${data.criteria[k]}: ${score}`), element("dd", "", explanation));
    });
    card.append(details);
  }
  if (answer.h) {
    const given = answer.h.map(([measure, score]) => `${measure} ${score}`).join(", ");
    card.append(element("div", "small", `${words.people}: ${given}`));
  }
  return card;
}

function preferenceOf([number, outcome, replies]) {
  const [first, second, judge] = data.pairs[number], names = { first: data.models[first], second: data.models[second] };
  const details = element("details"), list = element("dl");
  const loser = outcome === "first" ? names.second : names.first;
  const result = outcome === "tie" ? `${words.isEqual} ${names.first} ${words.and} ${names.second}`
    : `${names[outcome]} ${words.isPreferred} ${loser}`;
  details.append(element("summary", "", `${words.sideBySide}: ${result}`), list);
  replies.forEach(([preferred, explanation]) => {
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
  sample.m.forEach(([role, content]) => {
    const message = element("div", "message");
    message.append(element("div", "role", role), element("div", "text", content));
    left.append(message);
  });
  (sample.w || []).forEach(preference => left.append(preferenceOf(preference)));
  const answers = element("div", "answers"), reference = element("div", "answer reference");
  reference.append(element("h4", "", sample.r.length > 1 ? words.references : words.reference));
  sample.r.forEach(text => reference.append(element("div", "text message", text)));
  answers.append(reference);
  sample.a.forEach((answer, k) => { if (!hidden.has(k)) answers.append(answerCard(sample, answer, k)); });
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

if (!WORDS[language]) language = "en";
speak();
show();
follow();
