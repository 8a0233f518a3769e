// What is wrong with a page for those who do not see it, see little, or have a small screen.
//
// A small part of what axe checks, by the rules of WCAG 2.2 AA: names of controls, pictures and regions, one h1 and no
// level left out, ids, contrast as it is computed, targets of 24 pixels, nothing wider than the screen, pictures in
// their proportions. Gives a line for each problem.
() => {
  const problems = [];
  const say = (what, element) => problems.push(`${what}: ${element.outerHTML.slice(0, 160)}`);
  const shown = (element) => element.checkVisibility({ opacityProperty: false, visibilityProperty: true })
    && !element.closest('.unseen, .skip') && element.getClientRects().length > 0;
  const all = (selector) => [...document.querySelectorAll(selector)].filter(shown);

  // Names.
  const named = (element) => (element.getAttribute('aria-label') || '').trim()
    || [...(element.labels || [])].map((label) => label.textContent).join('').trim()
    || (element.getAttribute('aria-labelledby') || '').split(' ').map((id) => document.getElementById(id)?.textContent || '').join('').trim();
  for (const each of all('input, select, textarea, progress')) if (!named(each)) say('no label', each);
  for (const each of all('button, a[href], summary')) {
    const pictures = [...each.querySelectorAll('img')].map((image) => image.alt).join('');
    if (!(each.textContent.trim() || pictures || named(each))) say('no name', each);
  }
  for (const each of document.querySelectorAll('img')) if (!each.hasAttribute('alt')) say('no alt', each);
  for (const each of all('main img')) if (!each.alt) say('no text for a picture', each);
  for (const each of all('svg')) if (each.getAttribute('role') !== 'img' || !named(each)) say('an unnamed svg', each);
  for (const each of all('[role=region], fieldset')) if (!named(each) && !each.querySelector(':scope > legend')) say('an unnamed region', each);
  for (const each of document.querySelectorAll('[aria-describedby], [aria-labelledby]')) {
    for (const id of `${each.getAttribute('aria-describedby') || ''} ${each.getAttribute('aria-labelledby') || ''}`.split(' ').filter(Boolean)) {
      if (!document.getElementById(id)) say(`names #${id}, which is not there`, each);
    }
  }
  for (const each of all('table')) {
    if (!each.caption) say('no caption', each);
    if ([...each.querySelectorAll('th')].some((head) => !head.scope)) say('th without scope', each);
  }

  // Structure.
  const ids = [...document.querySelectorAll('[id]')].map((each) => each.id);
  for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) problems.push(`id ${id} twice`);
  if (document.querySelectorAll('main').length !== 1 || !document.querySelector('header nav[aria-label]')) problems.push('landmarks');
  if (!document.querySelector('[role=status][aria-live=polite]')) problems.push('no live region');
  if (!document.documentElement.lang || !document.title) problems.push('no language or title');
  const levels = all('h1, h2, h3, h4').map((each) => Number(each.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1) problems.push(`headings: ${levels}`);
  levels.forEach((level, place) => { if (place && level > levels[place - 1] + 1) problems.push(`headings: ${levels}`); });
  if (document.querySelectorAll('main > .view, main > form').length && document.querySelectorAll('nav [aria-current=page]').length !== 1) problems.push('no current view');

  // Contrast.
  const parse = (text) => {
    const found = text.match(/[\d.]+/g).map(Number);
    return { rgb: found.slice(0, 3), alpha: found.length > 3 ? found[3] : 1 };
  };
  const over = (front, back) => front.rgb.map((value, place) => value * front.alpha + back[place] * (1 - front.alpha));
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const layers = [];
    for (let each = element; each; each = each.parentElement) layers.push(parse(getComputedStyle(each).backgroundColor));
    let colour = [255, 255, 255];
    for (const layer of layers.reverse()) colour = over(layer, colour);
    return colour;
  };
  const ratio = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  let seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !shown(element) || element.closest('noscript, script, [disabled], option, .tooltip, [aria-busy=true]')) continue;
    const style = getComputedStyle(element);
    const back = ground(element);
    let alpha = 1;
    for (let each = element; each; each = each.parentElement) alpha *= Number(getComputedStyle(each).opacity);
    const colour = parse(element instanceof SVGElement ? style.fill : style.color);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const found = ratio(over({ rgb: colour.rgb, alpha: colour.alpha * alpha }, back), back);
    seen += 1;
    if (found < least) say(`contrast ${found.toFixed(2)} of "${walk.currentNode.textContent.trim().slice(0, 30)}"`, element);
  }
  if (seen < 5) problems.push(`only ${seen} texts`);
  for (const each of all('input:not([type=range]), select')) {
    const style = getComputedStyle(each);
    if (each.type !== 'checkbox' && ratio(parse(style.borderTopColor).rgb, ground(each.parentElement)) < 3) say('the border of a field is faint', each);
  }
  for (const each of all('svg .curve, svg .point, svg .column')) {
    const style = getComputedStyle(each);
    const colour = parse(each.matches('.curve') ? style.stroke : style.fill);
    if (ratio(colour.rgb, ground(each.closest('figure'))) < 3) say('a faint line', each);
  }

  // Sizes.
  if (document.documentElement.scrollWidth > document.documentElement.clientWidth) {
    const wide = all('main *').filter((each) => each.getBoundingClientRect().right > innerWidth + 1 && !each.closest('.scroll'));
    problems.push(`wider than the screen: ${wide.slice(0, 3).map((each) => each.outerHTML.slice(0, 100))}`);
  }
  for (const each of all('button, select, input, summary, nav a')) {
    const box = (each.type === 'checkbox' ? each.closest('label') || each : each).getBoundingClientRect();
    if (Math.min(box.height, box.width) < (each.type === 'checkbox' || each.type === 'range' ? 16 : 24)) say(`${box.width} × ${box.height} is small to hit`, each);
  }
  for (const each of all('main img')) {
    if (!each.complete || !each.naturalWidth) { say('a picture that does not show', each); continue; }
    const style = getComputedStyle(each);
    if (style.objectFit === 'contain') continue;
    const box = [each.clientWidth, each.clientHeight];
    if (Math.abs(box[0] / box[1] / (each.naturalWidth / each.naturalHeight) - 1) > 0.03) say(`${box} of a picture of ${each.naturalWidth} × ${each.naturalHeight}`, each);
  }
  return problems;
}
