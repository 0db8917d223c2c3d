// The live view and the gallery. Text from users is inserted as text, never as HTML.
const safelight = (() => {
  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  const ask = async (path, options) => {
    const answer = await fetch(path, options);
    const body = await answer.json();
    if (answer.status === 401) throw new Error("the token is needed again: reload this page");
    if (!answer.ok) throw new Error(body.detail || `the server answered ${answer.status}`);
    if (Array.isArray(body)) body.more = answer.headers.has("Link");  // a list may come in parts
    return body;
  };

  const final = job => !["queued", "running"].includes(job.status);
  const words = job => {  // a prompt may have 16,384 letters; the recipe shows all of them
    const letters = [...job.settings.prompt || "(no prompt)"];
    return letters.length > 160 ? `${letters.slice(0, 160).join("")}…` : letters.join("");
  };
  const png = data => `data:image/png;base64,${data}`;

  // --- one picture, with its settings and actions -----------------------------------------------

  const dialog = () => {
    let box = document.getElementById("picture");
    if (!box) {
      box = make("dialog", {id: "picture"});
      box.addEventListener("click", event => { if (event.target === box) box.close(); });
      document.querySelector(".gradio-container .contain").append(box);
    }
    return box;
  };

  const warnings = job => job.warnings.map(text =>
    make("p", {className: "warning", textContent: `Note: ${text}`}));

  const show = name => [...document.querySelectorAll("button[role=tab]")]
    .find(one => one.textContent.trim() === name)?.click();

  // When settings do nothing, by the beginning of their names. loras: of the recipe, which has those
  // in the prompt, too.
  const IDLE = [
    ["control_", settings => !settings.control_image_sha256],
    ["ip_adapter_", settings => !settings.ip_adapter_image_sha256],
    ["mask_", settings => !settings.mask_sha256],
    ["hires_", settings => settings.hires_scale === 1],
    ["emphasis", settings => settings.prompt_syntax === "plain"],
    ["lora_unmatched", (settings, loras) => !loras?.length],
  ];

  const open = (job, picture, events, changed) => {
    const box = dialog();
    const act = (label, name) => make("button", {
      type: "button", textContent: label,
      onclick: () => {
        box.close();
        show(name === "inside" ? "Inside" : "Make");  // at once; the answer fills the tab
        events.trigger(name, {id: picture.id});
      },
    });
    const size = `${picture.width}×${picture.height}`;
    // A job's own settings have wildcards.
    const settings = {model: job.model ?? picture.recipe.model.name, ...picture.recipe.settings,
                      seed: picture.seed, size};
    const recipe = make("dl");
    for (const [name, value] of Object.entries(settings)) {
      if ([null, "", false].includes(value) || value.length === 0) continue;
      if (["width", "height", "count"].includes(name)) continue;
      if (name === "prompt" && value === words(job)) continue;  // it is the title
      if (value === safelight.usual[name]) continue;
      const idle = IDLE.find(([start]) => name.startsWith(start))?.[1];
      if (idle?.(settings, picture.recipe.loras)) continue;
      recipe.append(make("dt", {textContent: name.replaceAll("_", " ")}),
                    make("dd", {textContent: String(value)}));
    }
    const several = job.pictures.length > 1 ? ` all ${job.pictures.length} pictures of this job` : "";
    const problem = make("p", {className: "problem", role: "alert"});
    const remove = make("button", {
      type: "button", textContent: several ? `Delete${several}` : "Delete",
      onclick: async () => {
        problem.textContent = "";
        try {
          if (remove.dataset.sure !== "yes") {  // `job` is as it was when the dialog opened
            const present = await ask(`/api/jobs/${job.id}`);
            if (!final(present)) {
              problem.textContent = "It is still being drawn: cancel it first.";
              return;
            }
            const many = present.pictures.length;
            remove.dataset.sure = "yes";
            remove.textContent = many > 1 ? `Delete all ${many} for good?` : "Delete for good?";
            return;
          }
          await ask(`/api/jobs/${job.id}`, {method: "DELETE"});
          box.close();
          changed();
        } catch (error) { problem.textContent = `It was not deleted: ${error.message}.`; }
      },
    });
    const close = make("button", {type: "button", className: "close", textContent: "Close",
                                  onclick: () => box.close()});
    box.replaceChildren(
      make("img", {src: `/api/pictures/${picture.id}`, alt: words(job)}),
      make("div", {},
        make("h2", {textContent: words(job)}),
        make("div", {className: "actions"},
          act("Use this one", "use"),
          // The sections are on the page if the chosen model edits, or has a ControlNet or an
          // IP-Adapter.
          ...document.getElementById("editing") ? [act("Edit this one", "edit")] : [],
          ...document.getElementById("guide") ? [act("Guide by this one", "guide")] : [],
          ...document.getElementById("prompting") ? [act("Prompt with this one", "prompt")] : [],
          act("All its settings", "recall"), act("Look inside", "inside"),
          make("a", {href: `/api/pictures/${picture.id}`, download: `${picture.id}.png`,
                     textContent: "Download"}),
          remove, close),
        problem, ...warnings(job), recipe));
    box.setAttribute("aria-label", "A picture");
    box.showModal();
  };

  const thumbnail = (job, picture, events, changed) => make("button",
    {type: "button", title: words(job), onclick: () => open(job, picture, events, changed)},
    make("img", {src: `/api/pictures/${picture.id}/thumbnail`, alt: words(job), loading: "lazy"}));

  const thumbnails = (grid, jobs, events, changed) => {
    const shown = JSON.stringify(jobs.map(job => job.pictures.map(picture => picture.id)));
    if (grid.dataset.shown === shown) return;  // the focus stays where it is
    grid.dataset.shown = shown;
    grid.replaceChildren(...jobs.flatMap(job => job.pictures.map(
      picture => thumbnail(job, picture, events, changed))));
  };

  // The newest picture, large, with its seed and its warnings; the older ones as thumbnails.
  const ENLARGED = 4;  // times at most: beyond that a small picture is only blurred
  const newestFirst = (grid, jobs, events, changed) => {
    const shown = JSON.stringify(jobs.map(job => [job.pictures.map(p => p.id), job.warnings]));
    if (grid.dataset.shown === shown) return;
    grid.dataset.shown = shown;
    const all = jobs.flatMap(job => job.pictures.map(picture => [job, picture]));
    const [[job, picture] = [], ...older] = all;
    if (!job) return grid.replaceChildren();
    const button = thumbnail(job, picture, events, changed);
    button.firstChild.src = `/api/pictures/${picture.id}`;
    const facts = `Seed ${picture.seed} · ${picture.width}×${picture.height}`;
    const many = job.pictures.length;
    const result = make("figure", {className: "result"}, button, make("figcaption", {},
      make("p", {className: "prompt", textContent: words(job)}), ...warnings(job),
      make("p", {textContent: many > 1 ? `${facts} · the first of ${many}` : facts})));
    result.style.setProperty("--side", `${ENLARGED * picture.width}px`);
    grid.replaceChildren(result, ...older.map(one => thumbnail(...one, events, changed)));
  };

  // --- the live view -----------------------------------------------------------------------------

  // On a phone the live view is below the form (studio.css): a button leads there, and back.
  const narrow = matchMedia("(max-width: 720px)");
  const leader = view => {
    const button = make("button", {type: "button", className: "leader", hidden: true});
    view.querySelector(".now").append(button);
    let form = null, there = false, back = false, wanted = false;
    const show = () => {
      const target = !there && wanted ? view : there && !back ? form : null;
      button.hidden = !narrow.matches || !target;
      button.textContent = target === view ? "See the picture ↓" : "Back to the prompt ↑";
      button.onclick = () => {
        target.scrollIntoView({block: "start"});
        if (target === view) wanted = false;
      };
    };
    const look = new IntersectionObserver(seen => {
      for (const {target, isIntersecting} of seen) {
        if (target === form) back = isIntersecting; else there = isIntersecting;
      }
      if (there) wanted = false;
      show();
    });
    const begin = () => {
      form = document.querySelector("#prompt");
      if (!form) { setTimeout(begin, 50); return; }
      for (const one of [view, form]) look.observe(one);
    };
    begin();
    narrow.addEventListener("change", show);
    return () => { wanted = !there; show(); };  // something new is to be seen
  };

  const now = (element, {trigger, watch, props}) => {
    const events = {trigger};
    const figure = label => {
      const image = make("img", {alt: label});
      return [image, make("figure", {}, make("div", {className: "screen"}, image),
                          make("figcaption", {textContent: label}))];
    };
    const [clean, cleanFigure] = figure("Clean estimate");
    const [noisy, noisyFigure] = figure("Noisy state");
    const title = make("p", {className: "prompt"});
    const bar = make("progress", {max: 1, value: 0});
    bar.setAttribute("aria-label", "Steps taken");
    const left = make("p", {className: "left"});
    const cancel = make("button", {type: "button", textContent: "Cancel"});
    const live = make("div", {className: "live", hidden: true},
      title, make("div", {className: "pair"}, cleanFigure, noisyFigure), bar,
      make("div", {className: "row"}, left, cancel));
    const waiting = make("ul", {className: "waiting"});
    const status = make("p", {className: "status", role: "status"});
    const nothing = make("p", {className: "nothing", hidden: true,
      textContent: "Your picture develops here. Type a prompt and press “Draw” or Ctrl+Enter."});
    const newest = make("div", {className: "grid newest"});
    const failures = make("div", {className: "problem", role: "alert"});
    element.querySelector(".now").replaceChildren(failures, status, live, waiting, nothing, newest);
    const lead = leader(element);

    let source = null, followed = null, began = null, timer = null, down = false, turns = 0;
    const mine = new Set();  // jobs of this page, which are shown before those of others
    const seen = new Set();  // jobs that were unfinished at the last look

    const progress = job => {
      const {step, steps} = job.progress;
      if (!steps) { left.textContent = "Waiting for its turn"; bar.removeAttribute("value"); return; }
      if (!began || step < began.step) began = {at: performance.now(), step};  // also if it starts again
      const pace = (performance.now() - began.at) / (step - began.step);
      const seconds = Math.ceil(pace * (steps - step) / 1000);
      const rest = step > began.step ? `, ${seconds} s left` : "";
      left.textContent = `Step ${step} of ${steps}${rest}`;
      bar.value = step / steps;
    };

    const follow = job => {
      if (followed === job.id && source && source.readyState !== EventSource.CLOSED) return;
      source?.close();
      if (followed !== job.id) {
        began = null;
        for (const image of [clean, noisy]) image.removeAttribute("src");
      }
      followed = job.id;
      title.textContent = words(job);
      cancel.onclick = async () => {
        try { await ask(`/api/jobs/${job.id}`, {method: "DELETE"}); }
        catch (error) { status.textContent = `It was not cancelled: ${error.message}.`; }
        refresh();
      };
      live.hidden = false;
      progress(job);
      if (document.hidden) return;  // a browser has six connections to one host, for all of its tabs
      source = new EventSource(`/api/jobs/${job.id}/events`);
      const on = (kind, then) => source.addEventListener(kind, event => then(JSON.parse(event.data)));
      on("progress", event => progress(event.job));
      on("picture", event => { progress(event.job); refresh(); });
      on("preview", event => {
        clean.src = png(event.preview);
        noisy.src = png(event.noisy);
        live.dataset.late = performance.timeOrigin + performance.now() - 1000 * event.at;
        progress(event.job);
      });
      on("end", () => { source.close(); refresh(); });
    };

    const told = job => {
      if (followed === job.id) { followed = null; live.hidden = true; }
      if (job.status === "failed") status.textContent = "";  // `failures` shows it
      else if (job.status === "cancelled") status.textContent = `“${words(job)}” was cancelled.`;
      else status.textContent = `“${words(job)}” is done.`;
    };

    // What 60 newer jobs leave out: those that run, the last pictures, and the next of this page's.
    const older = async jobs => {
      const listed = new Set(jobs.map(job => job.id)), rest = [];
      const awaited = [...new Set([...mine, ...seen])].filter(id => !listed.has(id)).slice(0, 8);
      const found = await Promise.all([
        ask("/api/jobs?status=running"), ask("/api/jobs?status=succeeded&limit=8"),
        ...awaited.map(id => ask(`/api/jobs/${id}`).catch(() => {  // deleted
          mine.delete(id);
          seen.delete(id);
          return [];
        })),
      ]);
      for (const job of found.flat()) {
        if (!listed.has(job.id)) rest.push(job);
        listed.add(job.id);
      }
      return rest.sort((a, b) => a.created_at < b.created_at ? 1 : -1);
    };

    const refresh = async () => {
      clearTimeout(timer);
      const turn = ++turns;
      let busy = true;
      try {
        const jobs = await ask("/api/jobs?limit=60");
        if (jobs.more) jobs.push(...await older(jobs));
        if (turn !== turns) return;  // a newer look has started
        if (down) status.textContent = "The server is back.";
        down = false;
        const open = jobs.filter(job => !final(job)).reverse();
        const made = jobs.filter(job => job.pictures.length).slice(0, 8);
        newestFirst(newest, made, events, refresh);  // before `told` says that one is done
        nothing.hidden = made.length > 0 || open.length > 0;
        for (const job of jobs) {
          if (!final(job)) seen.add(job.id);
          else if (seen.delete(job.id) && job.status === "failed") {
            failures.append(make("p", {textContent: `“${words(job)}” failed: ${job.error}`}));
          } else if (mine.delete(job.id)) told(job);  // too quick to be followed
        }
        const ours = open.filter(job => mine.has(job.id)), theirs = ours.length ? ours : open;
        const first = theirs.find(job => job.id === followed)
          || theirs.find(job => job.status === "running") || theirs[0];
        const ended = jobs.find(job => job.id === followed && final(job));
        if (ended) { source?.close(); told(ended); }
        if (first) follow(first);
        else if (followed) { source?.close(); live.hidden = true; }
        waiting.replaceChildren(...open.filter(job => job !== first).map(job => make("li", {},
          make("span", {textContent: words(job)}),
          make("span", {textContent: job.progress.steps
            ? `${job.progress.step} of ${job.progress.steps}` : "waiting"}),
          make("button", {type: "button", textContent: "Cancel", ariaLabel: `Cancel ${words(job)}`,
            onclick: async () => {
              await ask(`/api/jobs/${job.id}`, {method: "DELETE"}).catch(() => {});
              refresh();
            }}))));
        busy = open.length > 0;
      } catch (error) {
        if (turn !== turns) return;
        down = true;
        status.textContent = error instanceof TypeError || error instanceof SyntaxError
          ? "The server does not answer. This page continues when it does."
          : `The server answered: ${error.message}.`;
      }
      timer = setTimeout(refresh, busy ? 1000 : 4000);
    };

    document.addEventListener("visibilitychange", () => {
      if (document.hidden) source?.close(); else refresh();
    });
    watch("value", () => {
      mine.add(props.value);
      seen.add(props.value);
      failures.replaceChildren();
      lead();
      refresh();
    });
    refresh();
  };

  // --- the gallery -------------------------------------------------------------------------------

  const find = (element, {trigger, watch}) => {
    const events = {trigger};
    const field = make("input", {type: "search", placeholder: "Words of the prompt", maxLength: 200});
    const grid = make("div", {className: "grid"});
    const status = make("p", {className: "status", role: "status"});
    const more = make("button", {type: "button", textContent: "Older ones", hidden: true});
    element.querySelector(".find").replaceChildren(
      make("label", {}, "Search ", field), status, grid, more);
    let jobs = [], asked = 0;

    const load = async before => {
      const mine = ++asked;
      const query = new URLSearchParams({limit: 60, search: field.value});
      if (before) query.set("before", before);
      try {
        const page = await ask(`/api/jobs?${query}`);
        if (mine !== asked) return;  // a newer search has started
        jobs = [...(before ? jobs : []), ...page];
        more.hidden = !page.more;
        const made = jobs.filter(job => job.pictures.length);
        if (!made.length && !more.hidden) return load(jobs.at(-1).created_at);  // all cancelled
        const count = made.reduce((sum, job) => sum + job.pictures.length, 0);
        status.textContent = count ? `${count} ${count === 1 ? "picture" : "pictures"}`
          : field.value ? "No prompt contains these words." : "There are no pictures yet.";
        thumbnails(grid, made, events, () => load());
      } catch (error) { status.textContent = `The gallery cannot be read: ${error.message}.`; }
    };

    field.addEventListener("input", () => load());
    more.addEventListener("click", () => load(jobs.at(-1).created_at));
    watch("value", () => load());
    load();
  };

  return {now, find, make, ask};
})();
