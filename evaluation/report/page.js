"use strict";
/* Draws charts when they come into view, and runs the sample browser. Data are in #page-data; texts enter the page as
   text only, never as markup. */
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Charts

  /* The rows of a dataset that have the chosen texts; an empty choice allows all. */
  function rowsOf(dataset, choices) {
    const columns = Object.entries(dataset);
    const tests = [];
    for (const [name, choice] of Object.entries(choices)) {
      const column = dataset[name];
      if (choice === "" || column === undefined) continue;
      const code = column.levels.indexOf(choice);
      tests.push((at) => column.codes[at] === code);
    }
    const first = columns[0][1];
    const length = (first.codes || first).length;
    const rows = [];
    for (let at = 0; at < length; at += 1) {
      if (!tests.every((test) => test(at))) continue;
      const row = {};
      for (const [name, column] of columns) row[name] = column.levels ? column.levels[column.codes[at]] : column[at];
      rows.push(row);
    }
    return rows;
  }

  function theme(chart) {
    const ink = colour("--ink"), muted = colour("--muted"), line = colour("--line");
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      range: { category: chart.arms.map((arm) => colour(`--arm-${page.slots[arm]}`)) },
      view: { stroke: null },
      axis: {
        labelColor: muted, titleColor: muted, titleFontWeight: 400, titleFontSize: 12, labelFontSize: 12,
        gridColor: line, domainColor: line, tickColor: line, titlePadding: 8,
      },
      axisY: { labelColor: ink },
      text: { color: ink },
    };
  }

  const drawn = new Map();
  const charts = new Map(page.charts.map((chart) => [chart.id, chart]));
  /* The most that titles, labels and padding add to the height of a chart, px. */
  const AXES = 56;

  function choicesOf(chart) {
    const chosen = { ...chart.where };
    for (const control of document.querySelectorAll(`[data-panel="${chart.panel}"] select[data-column]`)) {
      chosen[control.dataset.column] = control.value;
    }
    return chosen;
  }

  function note(place, rows) {
    place.parentElement.querySelector(".nothing").hidden = rows.length > 0;
    place.hidden = rows.length === 0;
  }

  async function draw(place) {
    const chart = charts.get(place.dataset.chart);
    const rows = rowsOf(page.datasets[chart.panel], choicesOf(chart));
    note(place, rows);
    if (rows.length === 0) {
      drawn.get(place)?.finalize();
      drawn.set(place, null);
      place.replaceChildren();
      place.dataset.state = "empty";
      return;
    }
    drawn.get(place)?.finalize();
    // `ast` with the interpreter: no code is made from text, so the page's policy need not allow it.
    const result = await vegaEmbed(place, { ...chart.spec, datasets: { ...chart.spec.datasets, rows } }, {
      actions: false, ast: true, defaultStyle: false, renderer: chart.canvas ? "canvas" : "svg",
      config: theme(chart), tooltip: { disableDefaultStyle: true },
      logLevel: 1, // errors; a layer without marks for this choice is no reason for a warning
    });
    drawn.set(place, result);
    place.dataset.state = "drawn";
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting || drawn.has(entry.target)) continue;
      drawn.set(entry.target, null);
      draw(entry.target);
    }
  }, { rootMargin: "400px 0px" });
  const places = [...document.querySelectorAll("[data-chart]")];
  // Reserve the room before a chart is drawn and while it is redrawn: what lies below must not move under a click.
  for (const place of places) {
    place.style.minHeight = `${charts.get(place.dataset.chart).spec.height + AXES}px`;
  }
  places.forEach((place) => seen.observe(place));

  const redraw = (panel) => {
    for (const place of places) {
      if (drawn.has(place) && (!panel || charts.get(place.dataset.chart).panel === panel)) draw(place);
    }
  };
  dark.addEventListener("change", () => redraw());
  // On paper nothing can be unfolded.
  const unfolded = new Set();
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      unfolded.add(details);
    }
    places.filter((place) => !drawn.has(place)).forEach(draw);
  });
  addEventListener("afterprint", () => {
    unfolded.forEach((details) => { details.open = false; });
    unfolded.clear();
  });
  for (const control of document.querySelectorAll("select[data-column]")) {
    control.addEventListener("change", () => redraw(control.closest("[data-panel]").dataset.panel));
  }

  // A link to a folded section opens it.

  const unfold = (hash) => document.getElementById(hash.slice(1))?.querySelector("details.folded")
    ?.setAttribute("open", "");
  for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => unfold(link.hash));
  unfold(location.hash);

  // Where the reader is

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const spy = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("main section[id]").forEach((section) => spy.observe(section));

  // Sample browser

  const browser = document.getElementById("browser");
  if (!browser) return;
  const { models, items } = page.samples;
  const SIZE = 20;
  const part = (name) => browser.querySelector(`[data-part="${name}"]`);
  const input = { seed: part("seed"), split: part("split"), task: part("task"), search: part("search") };
  const disputed = part("disputed"), list = part("list"), count = part("count"), pages = part("pages");
  let number = 0;

  function element(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  /* Models whose answers are shown: the base, and every arm with the chosen seed. */
  const columns = () => models.map((model, at) => ({ ...model, at }))
    .filter((model) => model.arm === "base" || input.seed.value === "" || model.seed === input.seed.value);

  const labelOf = (model) => (model.arm === "base" ? "base"
    : input.seed.value === "" ? `${model.arm} · seed ${model.seed}` : model.arm);

  const WORDS = { 1: "right", 0: "wrong", p: "partly right", "-": "not asked" };
  const kinds = ["1", "0", ...(items.some((item) => item.right.includes("p")) ? ["p"] : [])];
  /* Models disagree from this distance of credits on; an answer without credit is right or wrong. */
  const { disputed: APART } = page.samples;
  const credit = (item, at) => (item.credit ? item.credit[at] : { 1: 1, 0: 0, "-": null }[item.right[at]]);

  function apart(item, shown) {
    const credits = shown.map((model) => credit(item, model.at)).filter((value) => value !== null);
    return credits.length > 0 && Math.max(...credits) - Math.min(...credits) >= APART;
  }

  /* One choice per model: any answer, right ones, wrong ones, and partly right ones where there are any. */
  const outcomes = part("outcomes");
  const chosenOutcome = new Map();
  function offerOutcomes() {
    outcomes.replaceChildren();
    for (const model of columns()) {
      const label = element("label");
      const name = element("span", "arm-name", labelOf(model));
      name.prepend(element("i", `swatch arm-${page.slots[model.arm]}`));
      const choice = element("select");
      for (const [value, text] of [["", "any"], ...kinds.map((kind) => [kind, WORDS[kind]])]) {
        const option = element("option", "", text);
        option.value = value;
        choice.append(option);
      }
      choice.value = chosenOutcome.get(model.at) || "";
      choice.addEventListener("change", () => { chosenOutcome.set(model.at, choice.value); show(0); });
      label.append(name, choice);
      outcomes.append(label);
    }
  }

  function matching(shown) {
    const text = input.search.value.trim().toLowerCase();
    return items.filter((item) => {
      const marks = shown.map((model) => item.right[model.at]);
      if (input.split.value && item.split !== input.split.value) return false;
      if (input.task.value && item.task !== input.task.value) return false;
      if (disputed.checked && !apart(item, shown)) return false;
      if (shown.some((model, at) => chosenOutcome.get(model.at) && chosenOutcome.get(model.at) !== marks[at])) return false;
      return !text || [item.prompt, item.truth, ...shown.map((model) => item.answers[model.at] || "")]
        .some((field) => field.toLowerCase().includes(text));
    });
  }

  function card(item, shown) {
    const article = element("article", "sample");
    article.append(element("p", "place", `${item.split} · ${item.task} · ${item.id}`));
    const question = element("div", "question");
    question.append(element("pre", "", item.prompt));
    const truth = element("p", "truth");
    truth.append(element("span", "label", "Truth "), element("code", "", item.truth));
    question.append(truth);
    const answers = element("dl", "answers");
    for (const model of shown) {
      const mark = item.right[model.at];
      const word = WORDS[mark];
      const sign = { 1: "✓", 0: "✗", "-": "–" }[mark] ?? credit(item, model.at).toFixed(2);
      const box = element("div", `answer mark-${word.replaceAll(" ", "-")}`);
      const name = element("dt");
      name.append(element("i", `swatch arm-${page.slots[model.arm]}`), document.createTextNode(labelOf(model)));
      const verdict = element("span", "mark", sign);
      verdict.setAttribute("role", "img");
      verdict.setAttribute("aria-label", mark === "p" ? `${word}: ${sign}` : word);
      name.append(verdict);
      box.append(name, element("dd", "", item.answers[model.at] ?? "–"));
      if (item.remarks?.[model.at]) box.append(element("dd", "remark", item.remarks[model.at]));
      answers.append(box);
    }
    article.append(question, answers);
    return article;
  }

  function show(target) {
    const shown = columns();
    const rows = matching(shown);
    const last = Math.max(0, Math.ceil(rows.length / SIZE) - 1);
    number = Math.min(Math.max(target, 0), last);
    list.replaceChildren(...rows.slice(number * SIZE, (number + 1) * SIZE).map((item) => card(item, shown)));
    count.textContent = `${rows.length} of ${items.length} items`;
    pages.textContent = rows.length ? `Page ${number + 1} of ${last + 1}` : "No item matches";
    // Not `disabled`: the focused button would lose its focus on the last page.
    part("back").setAttribute("aria-disabled", number === 0);
    part("on").setAttribute("aria-disabled", number === last);
  }

  input.seed.addEventListener("change", () => { chosenOutcome.clear(); offerOutcomes(); show(0); });
  input.split.addEventListener("change", () => show(0));
  input.task.addEventListener("change", () => show(0));
  input.search.addEventListener("input", () => show(0));
  disputed.addEventListener("change", () => show(0));
  const turn = (button, by) => {
    if (button.getAttribute("aria-disabled") === "true") return;
    show(number + by);
    list.scrollIntoView({ block: "start", behavior: "instant" });
  };
  part("back").addEventListener("click", (event) => turn(event.currentTarget, -1));
  part("on").addEventListener("click", (event) => turn(event.currentTarget, 1));
  offerOutcomes();
  show(0);
})();
